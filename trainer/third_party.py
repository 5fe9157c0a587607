"""What libraries are told before a command is built: how they read and write values, and what need not be said."""

from __future__ import annotations

import enum
import functools
import logging
import operator
import sys
import typing
import warnings
from typing import Any

import transformers
import yaml
from jsonargparse import Namespace, _typehints, set_parsing_settings
from lightning.pytorch import Trainer


def settle_parsing() -> None:
    """How values are read from a config and written to one; twice is once."""
    # No value is built where any value fits. Naming a deny list, be it empty, turns jsonargparse's own one (os,
    # subprocess, pickle, importlib, ...) from a warning into a refusal.
    set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
    _typehints.discard_init_args_on_class_path_change = _discard_settings
    # typing gives out an equal union that was asked for before: after an import of sentence_transformers Lightning's
    # say float | int, jsonargparse tries in this order, and 1 batch would be 1.0, all of them.
    hints = Trainer.__init__.__annotations__
    for name, types in [(key, typing.get_args(hint)) for key, hint in hints.items()]:
        if types[:2] == (float, int):
            hints[name] = functools.reduce(operator.or_, types[2:], int | float)
    # Defaults of some callbacks are members of an enum (the interval of Lightning's Timer), which PyYAML refuses to
    # write.
    yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))


def _discard_settings(_: Any, before: Any, now: Any) -> None:
    """Nothing of a class that is replaced is left: a scale of 20 is tuned for InfoNCE, and not for SigLIP.

    jsonargparse keeps what both classes have an argument for.
    """
    if before and before.get("init_args") and (old := before["class_path"]):  # no path: keys without a class
        new = now["class_path"]
        if old != new and _typehints.import_object(old) is not _typehints.import_object(new):
            before["init_args"] = Namespace()


def quieten() -> None:
    """Leaves out what libraries say that the user cannot act on."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message="Consider setting `persistent_workers=True`")  # no key of ours
    logging.getLogger("DeepSpeed").addFilter(_is_wanted)  # accelerate imports it for a model card
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(_is_wanted)  # twice is once
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def _is_wanted(record: logging.LogRecord) -> bool:
    # "stopped: `max_" tells of the regular end, by max_steps, which the user may never have set.
    noise = ("litlogger", "TPU available", "`weights_only` was not", "Setting accelerator to CPU", "stopped: `max_")
    return not any(part in record.getMessage() for part in noise)
