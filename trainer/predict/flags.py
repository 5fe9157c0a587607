"""Flags of the subcommands that take no config; a mistake is one sentence."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.config_files import ConfigError
from trainer.messages import did_you_mean

# What errors of the parts call by the key of a config, and these commands by a flag.
_KEYS = {
    "model.encoder.backbone": "--model",
    "model.encoder.max_length": "--max-length",
    "model.encoder.trust_remote_code to true": "--trust-remote-code",
    ", or train both: encoder and document_encoder of the model, each with this backbone and its route": "",
    "model.encoder.route": "--task",
    "model.max_tokens": "--max-tokens",
    "--trainer.default_root_dir": "--out",
    "set on_bad_row: skip": "give --on-bad-row skip",
}


class Flags(argparse.ArgumentParser):
    """The parser of one subcommand.

    Args:
        command: its name.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"trainer {command}", add_help=False, allow_abbrev=False)

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """The values of all flags.

        Raises:
            ConfigError: a flag is unknown or missing, or its value can't be meant.
        """
        options, others = self.parse_known_args(list(args))
        if others:
            # The dashes are alike in all of them.
            near = did_you_mean(others[0].partition("=")[0], list(self._option_string_actions), cutoff=0.65)
            raise ConfigError(f"'{others[0]}' is no flag of {self.prog}.{near or f' See {self.prog} --help'}")
        return options

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): ", r"\1: ", message)
        message = message.replace("the following arguments are required:", f"{self.prog} also needs")
        raise ConfigError(f"{message}; see {self.prog} --help")


def at_least(lowest: int) -> Any:
    """The type of a whole number from ``lowest`` on."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"is '{text}'; it must be a whole number, {lowest} or more")
        return int(text)

    return whole


def finite(text: str) -> float:
    """The type of a number that a similarity can be compared with."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"is '{text}'; it must be a number")
    return number


def add_reading(flags: Flags) -> None:
    """How rows are read."""
    flags.add_argument("--split", default="train", help="of a hub data set or a folder")
    flags.add_argument(
        "--on-bad-row", default="fail", choices=("fail", "skip"), help="or skip, which leaves out up to 100"
    )
    flags.add_argument("--cache-dir", type=Path, help="where rows are kept, as of data.cache_dir")


def add_encoder(flags: Flags) -> None:
    """Which encoder, and how it computes."""
    flags.add_argument("--revision", help="of a hub id")
    flags.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    flags.add_argument("--max-length", type=at_least(1), help="pieces kept of a text (as the model says, to 8,192)")
    flags.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="or bf16, fp16")
    flags.add_argument("--max-tokens", type=at_least(1), default=16384, help="of one forward, for its memory")


def add_place(flags: Flags) -> None:
    """Where it runs."""
    flags.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="or cpu, gpu")
    flags.add_argument("--devices", type=at_least(1), help="ranks per node (all GPUs, or 1 CPU process)")
    flags.add_argument("--nodes", type=at_least(1), help="srun says both by itself")


def in_flags(message: str) -> str:
    """An error of the parts in the words of these commands."""
    for key, flag in _KEYS.items():
        message = message.replace(key, flag)
    return message
