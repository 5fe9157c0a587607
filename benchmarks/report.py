"""Writes benchmarks/RESULTS.md from the files of throughput.py, memory.py, scaling.py, quality.py and gpu.py in
results/.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.compare.fold import Spread
from trainer.compare.show import metric

HERE = Path(__file__).parent
HEAD = """# Results

Written by `python benchmarks/report.py` from `benchmarks/results/**/*.json`; a test holds the two together. What the
figures mean, and how they are taken, stands in [README.md](README.md); the tries behind them in [LOG.md](LOG.md).
"default" and "best" are settings of sentence-transformers, explained in [peer.py](peer.py); "peer" is its default. A
ratio is ours over theirs in speed, the median of the rounds (lowest to highest round behind it), and ours over theirs
in memory. The share is the arithmetic of the texts' tokens over what torch's large matrix products reached in the same
minutes; in fp32 on a CPU our layers take those of oneDNN, which are faster where MKL is not at home. The loss is the
mean of all steps, warm-up included: the same rows, dropout masks apart. Pieces are those that the whole file uses: ours
trains their embeddings, theirs all. Of one rank and two, compare rows per second within a side only; the speed-up is
the median of the rounds', not that of the medians beside it.
"""
_STEP = ("shape", "batch", "precision")
_SPEED = (*_STEP, "pieces", "side", "rows/s", "tokens/s", "share", "peak MiB", "loss", "ours is", "its memory", "run")
_MEMORY = (*_STEP, "peak MiB", "ours is", "run")
_QUALITY = ("set", "precision", "side", "before", "after, mean and deviation", "seeds", "run")
_SCALING = (*_STEP, "side", "rows/s on 1", "on 2", "speed-up", "gradient MB", "other MB", "run")


def document(results: Path) -> str:
    """The whole of RESULTS.md."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.rglob("*.json"))]
    runs: list[str] = []
    parts = [HEAD]
    for title, header, rows_of in (
        ("Speed and memory of a step", _SPEED, _speed_rows),
        ("Peak memory of a step", _MEMORY, _memory_rows),
        ("One rank and two", _SCALING, _scaling_rows),
        ("Dev Spearman after one epoch", _QUALITY, _quality_rows),
    ):
        rows: list[Sequence[str]] = []
        for path, content in found:
            made = list(rows_of(content))
            if made:
                runs.append(_run(len(runs) + 1, path.relative_to(results).as_posix(), content))
                rows += [(*row, f"[{len(runs)}]") for row in made]
        if rows:
            parts.append(f"## {title}\n\n{_table(header, rows)}")
    if not runs:
        return "\n".join([*parts, "Nothing is measured yet.\n"])
    return "\n".join([*parts, "## Runs\n\n" + "\n".join(runs) + "\n"])


def _speed_rows(content: dict[str, Any]) -> Iterable[Sequence[str]]:
    for report in content.get("reports", [content] if "sides" in content else []):
        for name, side in report["sides"].items():
            ratio = report["ratios"].get(name)
            share = f"{side['share_of_matrix_rate']:.2f}"
            if side.get("share_with_replays", 0) > 1.01 * side["share_of_matrix_rate"]:
                share += f" ({side['share_with_replays']:.2f} with replays)"
            each = ratio["speed_each_round"] if ratio else []
            yield (
                report["shape"],
                f"{report['batch_size']:,}",
                report["precision"],
                f"{report['prepared']['used_pieces']:,}",
                name,
                f"{side['rows_per_s']:,.1f}",
                f"{side['tokens_per_s']:,.0f}",
                share,
                f"{side['peak_device_mib'] or side['peak_host_mib']:,.0f}",
                f"{statistics.mean(side['losses']):.4f}",
                f"**{ratio['speed']:.2f}x** {spread(each)}" if ratio else "",
                f"{ratio['memory']:.2f}x" if ratio else "",
            )


def spread(rounds: Sequence[float]) -> str:
    """What stands behind a median."""
    return "(1 round)" if len(rounds) == 1 else f"({min(rounds):.2f} to {max(rounds):.2f})"


def _memory_rows(content: dict[str, Any]) -> Iterable[Sequence[str]]:
    for row in content.get("memory", []):
        peaks = row["peak_mib"]
        yield (
            row["shape"],
            f"{row['batch_size']:,}",
            row["precision"],
            ", ".join(f"{side} {peak:,.0f}" for side, peak in peaks.items()),
            ", ".join(f"{peaks['ours'] / peak:.2f}x of {side}" for side, peak in peaks.items() if side != "ours"),
        )


def _scaling_rows(content: dict[str, Any]) -> Iterable[Sequence[str]]:
    for side in content.get("scaling", []):
        moved = side["bytes_per_step"]
        yield (
            content["shape"],
            f"{content['batch_size']:,}",
            content["precision"],
            side["side"],
            f"{side['rows_per_s']['1']:,.1f}",
            f"{side['rows_per_s']['2']:,.1f}",
            f"{side['speedup']:.2f}x",
            f"{moved['gradient'] / 1e6:,.1f}",
            f"{(moved['all'] - moved['gradient']) / 1e6:,.2f}",
        )


def _quality_rows(content: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, measured in content.get("quality", {}).items():
        for side, runs in measured["runs"].items():
            scores = [run["spearman"] for run in runs.values()]
            yield (
                name,
                content["precision"],
                side,
                f"{measured['before']:.4f}",
                metric(Spread.of(scores)),
                ", ".join(f"{score:.4f}" for score in scores),
            )


def _run(number: int, name: str, content: dict[str, Any]) -> str:
    device = content["device"] if content["device"] != "cpu" else f"{content['cpu']}, {content['cores']} cores"
    threads = content.get("threads")
    versions = content["versions"]
    words = [
        device + (f", {threads} threads" if threads else ""),
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"sentence-transformers {versions['sentence-transformers']}",
        f"commit {content['commit'][:10]}" + (" with changes" if content["uncommitted_changes"] else ""),
        f"`results/{name}`",
    ]
    if content.get("data") == "generated":
        words.insert(1, "generated texts")
    return f"{number}. `{content['command']}`  \n   " + "; ".join(words)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(document(HERE / "results"), encoding="utf-8")
