"""``trainer demo``: from nothing to a trained, exported and loaded sentence encoder, without network or hub.

The texts come from a small grammar, the encoder has random weights and a tokenizer of its own; everything
after that is the product itself. `write_pairs` and `write_encoder` also give the tests data and backbones.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config_files import ConfigError
from trainer.demo_data import MAX_SCORE, Pair, read_pairs, write_pairs
from trainer.demo_encoder import write_encoder

__all__ = ["main", "run_demo", "spearman", "write_encoder", "write_pairs"]

if TYPE_CHECKING:
    from rich.table import Table
    from sentence_transformers import SentenceTransformer

_NEAREST = 3  # sentences of each query, and queries
CONFIG = """\
# Written by `trainer demo`. Any key can be changed on the command line: --model.learning_rate 5e-4
seed_everything: 42
model:
  encoder: {{backbone: {encoder}, max_length: 64}}
  loss: {{class_path: CosineSimilarity}}
  learning_rate: 1.0e-3      # high, for weights that start random; 2e-5 to 5e-5 suits a pretrained encoder
  warmup_ratio: 0.1
data:
  train:
    - path: {train}
      columns: {{anchor: sentence1, positive: sentence2, score: score}}
      score_range: [0, {max_score}]
  validation:
    - name: dev
      path: {dev}
      columns: {{anchor: sentence1, positive: sentence2, score: score}}
      score_range: [0, {max_score}]
      evaluator: STS
  batch_size: 32
  cache_dir: {cache}
trainer:
  max_epochs: 2
  devices: 1
  val_check_interval: 100
  default_root_dir: {run}
tracking: {{wandb: "off"}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="trainer demo", description="Writes data and an encoder, trains, exports and tries the result."
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="folder to write (runs/demo)")
    folder: Path = parser.parse_args(argv).dir
    with _one_thread():
        run_demo(folder)
    return 0


def run_demo(folder: Path, num_train: int = 5000, num_dev: int = 500, hidden: int = 128) -> tuple[float, float]:
    """Data, encoder, training, export and a look at the result; returns dev Spearman before and after.

    Raises:
        ConfigError: ``folder`` holds something that the demo did not write.
        SystemExit: the training failed and has said why.
    """
    import transformers
    from rich.console import Console
    from sentence_transformers import SentenceTransformer

    from trainer.cli import main as run_cli

    _clear(folder)
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    config = _write_config(folder)  # first: it marks the folder as a demo's, should this one be interrupted
    train_path, dev_path = write_pairs(folder, num_train, num_dev)
    texts = [text for pair in read_pairs(train_path) for text in (pair.sentence1, pair.sentence2)]
    encoder = write_encoder(folder / "encoder", texts, hidden=hidden)
    dev = read_pairs(dev_path)
    console.print(
        f"[bold]1[/] {num_train:,} training and {num_dev:,} held-out pairs, a random encoder in {folder}",
        soft_wrap=True,
    )
    before = spearman(SentenceTransformer(str(encoder), device="cpu"), dev)

    command = ["fit", "--config", str(config)]
    console.print(f"[bold]2[/] trainer {shlex.join(command)}")
    if status := run_cli(command):
        raise SystemExit(status)

    model = SentenceTransformer(str(folder / "run" / "model"), device="cpu")
    after = spearman(model, dev)
    console.print(
        f"[bold]3[/] Spearman on held-out pairs, measured by sentence-transformers: "
        f"before {before:.3f}, after [bold green]{after:.3f}[/]",
        soft_wrap=True,
    )
    console.print(_nearest_table(model, dev))
    console.print(_next_commands(folder, config), soft_wrap=True, highlight=False)
    return before, after


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads wait for each other in a spin and gain little on an encoder this small: on a machine busy with
    other work, two of them were measured 15 times slower than one."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _clear(folder: Path) -> None:
    """Removes what an earlier demo left; nothing else, for ``--dir`` may point anywhere."""
    is_used = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if is_used and not (folder / "demo.yaml").exists():
        raise ConfigError(f"{folder} holds something that is no demo; give a new folder: --dir runs/demo-2")
    for name in ("encoder", "cache", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = ("encoder", "train.jsonl.gz", "dev.jsonl.gz", "cache", "run")
    # a JSON string is a YAML string
    paths = {file.partition(".")[0]: json.dumps(str(folder / file), ensure_ascii=False) for file in files}
    config = folder / "demo.yaml"
    config.write_text(CONFIG.format(max_score=MAX_SCORE, **paths), encoding="utf-8")
    return config


def spearman(model: SentenceTransformer, pairs: Sequence[Pair]) -> float:
    """Rank correlation of the cosine of the two sentences with the score."""
    from scipy.stats import spearmanr

    first = model.encode([pair.sentence1 for pair in pairs], convert_to_tensor=True)
    second = model.encode([pair.sentence2 for pair in pairs], convert_to_tensor=True)
    cosines = model.similarity_pairwise(first, second).cpu().numpy()
    return float(spearmanr(cosines, [pair.score for pair in pairs]).statistic)


def _nearest_table(model: SentenceTransformer, pairs: Sequence[Pair]) -> Table:
    """The sentences of ``pairs`` that lie nearest to the first of the best-scored pairs."""
    from rich.table import Table

    queries = [pair.sentence1 for pair in pairs if pair.score >= MAX_SCORE - 1][:_NEAREST]
    corpus = sorted({text for pair in pairs for text in (pair.sentence1, pair.sentence2)} - set(queries))
    similarity_QN = model.similarity(model.encode(queries), model.encode(corpus))
    table = Table(title=f"{_NEAREST} nearest of {len(corpus):,} held-out sentences", title_justify="left")
    table.add_column("query")
    table.add_column("nearest")
    table.add_column("cosine", justify="right")
    for query, similarity_N in zip(queries, similarity_QN, strict=True):
        top = similarity_N.topk(_NEAREST)
        for place, (cosine, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            last = place == _NEAREST - 1
            table.add_row("" if place else query, corpus[index], f"{cosine:.3f}", end_section=last)
    return table


def _next_commands(folder: Path, config: Path) -> str:
    trainer = "trainer" if shutil.which("trainer") else shlex.join([sys.executable, "-m", "trainer"])
    fit = f"{trainer} fit --config {shlex.quote(str(config))}"
    two, cluster = (  # "run" holds a run
        f"--trainer.default_root_dir {shlex.quote(str(folder / name))}" for name in ("two-ranks", "slurm")
    )
    # As the README has it: a backbone that knows words, which the encoder of the demo does not.
    yours = (
        "--config configs/stsb.yaml --config configs/hardware/cpu.yaml "
        "--data.train.path pairs.jsonl.gz --data.train.score_range '[0, 5]' "
        "--data.validation.path dev.jsonl.gz --data.validation.score_range '[0, 5]'"
    )
    model = str(folder / "run" / "model")
    commands = {
        "two processes": f"{fit} --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp {two}",
        "a cluster": f"sbatch --nodes 2 slurm/train.sh {shlex.quote(str(config))} {cluster}",
        "your data": f"{trainer} fit {yours}",
        "all flags": f"{trainer} fit --help",
    }
    lines = [
        f"[bold]The model[/] SentenceTransformer({json.dumps(model)}), its card {model}/README.md",
        "[bold]Next[/]",
    ]
    return "\n".join(lines + [f"  {name:<14}{command}" for name, command in commands.items()])
