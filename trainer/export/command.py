"""``trainer export``: a run becomes a folder that other programs load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config_files import ConfigError
from trainer.predict.flags import Flags

_USAGE = "two paths are needed: trainer export RUN_OR_CHECKPOINT OUT [--legacy] [--format onnx]"


def flags() -> Flags:
    parser = Flags("export")
    parser.add_argument("--legacy", action="store_true", help="in the layout that sentence-transformers 3 to 5 load")
    parser.add_argument("--format", default="torch", choices=("torch", "onnx"), help="or onnx: weights and a graph")
    return parser


def export(args: Sequence[str]) -> int:
    """Runs the command; the exit status is 0.

    Raises:
        ConfigError: the command line can't be meant.
        ValueError: the run can't be exported, or has no such format.
    """
    parser = flags()
    options, words = parser.parse_known_args(list(args))  # paths may stand on both sides of a flag
    parser.read([word for word in words if word.startswith("-")])
    if len(words) != 2:
        raise ConfigError(_USAGE)
    source, out = map(Path, words)
    if not source.exists():
        raise ConfigError(f"there is no run or checkpoint {source}")
    from trainer.export.sentence_transformers import export_run

    export_run(source, out, legacy=options.legacy, onnx=options.format == "onnx")
    return 0
