"""All shapes on one NVIDIA GPU in under 8 minutes, beside sentence-transformers at its defaults and at its best.

    python benchmarks/gpu.py --json benchmarks/results/gpu/NAME.json
    python benchmarks/gpu.py --cpu       # tiny models on the CPU: the same code, to see the script itself

It needs neither network nor data: models are random at their real sizes, texts are generated with the lengths of the
real sets (generated.py); --data takes the real ones. What is measured is throughput.py's, in bf16. Shapes that do not
fit into --minutes any more are left out, and said.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throughput import add_options, compare, described, show, write
from turns import SIDES, prepare_environment

if TYPE_CHECKING:
    from shapes import Shape

NAMES = ("hebrew-nli", "ja-en", "chatbot-ko", "stsb", "nli-chunks", "intents-ko")
STEPS, TURNS, WARMUP = 40, 3, 20
CHUNKED_BATCH, CHUNKED_TOKENS = 8192, 65536


def shapes(cpu: bool, generated: bool) -> dict[str, Shape]:
    """Those of throughput.py, for a GPU, or tiny."""
    from shapes import SHAPES, RandomEncoder

    found = {}
    for name in NAMES:
        shape = SHAPES[name]
        if shape.encoder is None and generated:  # all-MiniLM-L6-v2 with random weights
            shape = replace(shape, encoder=RandomEncoder("minilm", 30_522, 384, layers=6))
        if shape.chunked:
            shape = replace(shape, batch_size=CHUNKED_BATCH, max_tokens=CHUNKED_TOKENS)
        if cpu:
            assert shape.encoder is not None
            tiny = replace(shape.encoder, num_embeddings=4000, hidden=64, layers=2, heads=4)
            shape = replace(shape, encoder=tiny, batch_size=128 if shape.chunked else 8, max_tokens=1024)
        found[name] = shape
    return found


def turns_of(shape: Shape, cpu: bool) -> tuple[int, ...]:
    if shape.chunked:
        return (1, 1, 1) if cpu else (2, 2, 2, 2)
    return (2, 3, 3) if cpu else (WARMUP, *[STEPS] * TURNS)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES[:-1])
    parser.add_argument("--peer", nargs="+", choices=SIDES[1:], default=["default", "best"])
    parser.add_argument("--minutes", type=float, default=7.5, help="start no shape that may end later")
    add_options(parser)
    parser.set_defaults(precision="bf16", threads=None, data=None)
    args = parser.parse_args()
    if args.cpu:
        args.threads = args.threads or 1
    prepare_environment(args.threads)
    import torch

    if args.cpu == torch.cuda.is_available():
        parser.error("--cpu is for machines without a GPU" if args.cpu else "no GPU is seen here; --cpu shows the code")
    reports: list[dict[str, Any]] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="trainer-gpu-") as folder:
        generated = args.data is None
        if generated:
            from generated import write_folder

            # As many rows as the largest run takes, warm-up included; tiny texts on a CPU.
            sizes = {"num_rows": 1500, "num_words": 3000, "length": 0.3} if args.cpu else {"num_rows": 80_000}
            args.data, args.cache = write_folder(Path(folder) / "data", **sizes), Path(folder) / "cache"
        args.data = Path(args.data).resolve()
        longest = 0.0
        for name, shape in shapes(args.cpu, generated).items():
            if name not in args.shapes:
                continue
            if not args.cpu and time.monotonic() - began + longest > 60 * args.minutes:
                left_out.append(name)
                continue
            start = time.monotonic()
            reports.append(compare(name, shape, ["ours", *args.peer], turns_of(shape, args.cpu), args))
            longest = max(longest, time.monotonic() - start)
            show(reports[-1])
            write(args.json, summary(reports, left_out, generated, began, args))
    write(args.json, summary(reports, left_out, generated, began, args))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(reports)} shapes in {minutes:.1f} minutes" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    )


def summary(
    reports: list[dict[str, Any]], left_out: list[str], generated: bool, began: float, args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "reports": reports,
        "left_out": left_out,
        "data": "generated" if generated else "real",
        "tiny": args.cpu,
        "minutes": (time.monotonic() - began) / 60,
        **described(),
    }


if __name__ == "__main__":
    main()
