"""Peak memory of a training step, ours beside sentence-transformers', for several shapes.

    python benchmarks/memory.py --precision bf16 --json benchmarks/results/memory/NAME.json

The same processes as in throughput.py, with a few steps: on a host what the process holds at most during the timed
steps, without mapped files and without what its imports hold; on a GPU what tensors hold at most.
"""

from __future__ import annotations

import argparse
from typing import Any

from throughput import SHAPE_NAMES, add_options, compare, described, parse, peak_mib, write
from turns import SIDES, prepare_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SHAPE_NAMES if name != "nli-chunks"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPE_NAMES, default=names)
    parser.add_argument("--peer", nargs="+", choices=SIDES[1:], default=["default"])
    parser.add_argument("--steps", type=int, default=20, help="after two of warm-up; longer batches come by chance")
    add_options(parser)
    args = parse(parser)
    prepare_environment(args.threads)
    from shapes import SHAPES

    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        report = compare(name, SHAPES[name], ["ours", *args.peer], (2, args.steps), args)
        peaks = {side: peak_mib(result) for side, result in report["sides"].items()}
        rows.append({"shape": name, "precision": args.precision, "batch_size": report["batch_size"], "peak_mib": peaks})
        share = ", ".join(f"{peaks['ours'] / peaks[side]:.2f}x of {side}" for side in args.peer)
        print(f"{name:12} " + "  ".join(f"{side} {peak:.0f} MiB" for side, peak in peaks.items()) + f"  ours {share}")
        write(args.json, {"memory": rows, "steps": args.steps, **described()})


if __name__ == "__main__":
    main()
