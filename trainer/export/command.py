"""``trainer export``: a run becomes a folder that other programs load, and on demand a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trainer.config_files import ConfigError
from trainer.export.push import push, refuse_unready
from trainer.predict.flags import Flags

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_USAGE = "two paths are needed: trainer export RUN_OR_CHECKPOINT OUT [--legacy] [--format onnx] [--push OWNER/NAME]"


def flags() -> Flags:
    parser = Flags("export")
    parser.add_argument("--legacy", action="store_true", help="in the layout that sentence-transformers 3 to 5 load")
    parser.add_argument("--format", default="torch", choices=("torch", "onnx"), help="or onnx: weights and a graph")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload it to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="where --push makes the repository")
    return parser


def export(args: Sequence[str]) -> int:
    """Runs the command; the exit status is 0.

    Raises:
        ConfigError: the command line can't be meant.
        ValueError: the run can't be exported, or the hub does not take it.
    """
    parser = flags()
    options, words = parser.parse_known_args(list(args))  # paths may stand on both sides of a flag
    parser.read([word for word in words if word.startswith("-")])
    if len(words) != 2:
        raise ConfigError(_USAGE)
    source, out = map(Path, words)
    if not source.is_dir():
        raise ConfigError(f"there is no run or checkpoint {source}; give the folder that a fit wrote")
    if options.push is None:
        if options.private:
            raise ConfigError("--private is about a repository: give --push OWNER/NAME too")
    elif not _REPOSITORY.fullmatch(options.push):
        raise ConfigError(f"--push {options.push}: a repository has an owner and a name, --push OWNER/NAME")
    else:
        refuse_unready(options.push)
    from trainer.export.sentence_transformers import export_run

    run = export_run(source, out, options.legacy, options.format == "onnx", options.push)
    print(f"exported: {out}: step {run.step:,}, {run.reason.replace('`', '')}")
    if options.push:
        message = f"Export of {run.name}, step {run.step:,}"
        print(f"pushed: {push(out, options.push, message, options.private)}")
    return 0
