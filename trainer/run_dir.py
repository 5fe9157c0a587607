"""Where a run lives: a function of command line and environment alone, the same on all ranks."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config_files import ConfigError, Flag, walk_keys
from trainer.files import write_whole
from trainer.identity import is_part
from trainer.run_lock import refuse_held
from trainer.tracking.redact import redact_arguments
from trainer.tracking.runs import METRICS_FILE

# These say where a run is, how it is watched and how it goes on, not what it computes: on other hardware, and by the
# words that a refusal tells, it keeps its name.
_NOT_IN_NAME = re.compile(
    r"ckpt_path|weights_only|seed_everything|tracking(\..*)?|(watch|check|resume|checkpoint)\..*"
    r"|data\.(num_workers|cache_dir|stream_cache_gib)|model\.(max_tokens|print_first_batch)"
    r"|trainer\.(default_root_dir|devices|num_nodes|accelerator|strategy(\..*)?|logger(\..*)?|enable_.*|log_every_n_steps)"
)
# A run may go on with these from another hardware file, and the seed has a word of its own in the name.
_OF_HARDWARE = re.compile(r"seed_everything|trainer\.(precision|strategy)")
# Ways to read a file, told by their hash alone: they would leave no room for the file itself.
_IN_HASH = re.compile(r"data\..*\.(columns(\..*)?|score_range)")
_MAX_NAME = 100
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def name_run(
    configs: Sequence[str],
    flags: Sequence[Flag],
    seed: int,
    environ: Mapping[str, str],
    files: Sequence[yaml.MappingNode] = (),
) -> Path:
    """``runs/<recipe>/[<file>_]<overrides>_seed=<seed>[_job=<id>]``; a requeued job keeps its id, so its folder.

    Args:
        configs: as they were named; the first is the recipe.
        flags: beside them.
        seed: of the run.
        environ: of the process.
        files: what stands in the configs. Those behind the recipe that decide what is trained, as debug.yaml does,
            are in the name; those that say where are not.
    """
    recipe = _recipe(Path(configs[0]).stem) if configs else "run"
    stems = [Path(file.start_mark.name).stem for file in files if _is_later(file, configs) and _decides(file)]
    overrides = {flag.key: _one_way(flag.text or "") for flag in flags if not _NOT_IN_NAME.fullmatch(flag.key)}
    shown = [key for key in sorted(overrides) if not _IN_HASH.fullmatch(key)]
    said = [f"{_short_key(key, overrides)}={overrides[key]}" for key in shown]
    # Redacted as options of a command line, for the name of a run goes wherever the run is watched.
    safe = [word[2:] for word in redact_arguments([f"--{word}" for word in said])]
    whole, told = "_".join([*stems, *said]), "_".join([*stems, *(_last_part(word) for word in safe)])
    short = _sanitise(told)[:_MAX_NAME] if whole else ""
    if short != whole or len(shown) < len(overrides):  # two different runs must not share a name
        digest = hashlib.sha256(repr([*stems, *sorted(overrides.items())]).encode()).hexdigest()[:8]
        short += f"-{digest}" if short else digest
    job = environ.get("SLURM_JOB_ID")
    parts = [short, f"seed={seed}", f"job={_sanitise(job)}" if job else ""]
    return Path("runs") / recipe / "_".join(part for part in parts if part)


def _is_later(file: yaml.MappingNode, configs: Sequence[str]) -> bool:
    """Whether a file stands behind the recipe."""
    return file.start_mark.name != str(Path(configs[0]))


def _decides(file: yaml.MappingNode) -> bool:
    """Whether a file says what is trained, not only where."""
    return any(is_part(key) and not _OF_HARDWARE.fullmatch(key) for key, _, _ in walk_keys(file))


def _one_way(text: str) -> str:
    """A list or keys as YAML would write them, for [0,5] and [0, 5] are one run; else the text as it was typed."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # of a date that there is not
        return text
    if not isinstance(value, list | dict):
        return text
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def _short_key(key: str, keys: Iterable[str]) -> str:
    """The last names of a dotted key, as many as tell it from the other keys."""
    names = key.split(".")
    ends = (".".join(names[-count:]) for count in range(1, len(names)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def _last_part(word: str) -> str:
    """``key=folder/name`` without the folder."""
    key, _, value = word.partition("=")
    return f"{key}={value.rstrip('/').rpartition('/')[2]}"


def _recipe(stem: str) -> str:
    """As its file is called; where characters had to go, the rest tells it from others."""
    name = _sanitise(stem)
    return name if name == stem else f"{name}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"


def _sanitise(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]", "-", text).strip(".") or "-"


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left metrics or checkpoints in ``folder``."""
    checkpoints = folder / "checkpoints"
    return (folder / METRICS_FILE).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def refuse_used(folder: Path, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where a fresh fit would mix two runs in one folder; names the process of one that goes on."""
    if holds_run(folder):
        refuse_held(folder, environ)
        raise ConfigError(
            f"{folder} already holds a run; go on with it: --ckpt_path auto"
            f" · or start anew beside it: --trainer.default_root_dir {folder}-2"
        )


def refuse_folder_of_runs(folder: Path) -> None:
    """Raises ValueError where one run is wanted, and runs lie in ``folder``: fit writes ``runs/<recipe>/<run>``."""
    names = sorted(path.name for path in folder.iterdir() if holds_run(path)) if folder.is_dir() else []
    if names and not holds_run(folder):
        listed = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(f"{folder} is a folder of {len(names)} run(s): {listed}; name one: {folder / names[0]}")


def write_config(config: dict[str, Any], path: Path) -> None:
    """In one step, over an older file: a requeued run writes its config again."""
    write_whole(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process is global rank 0, known before any process group: by what launchers set."""
    if "TORCHELASTIC_RUN_ID" in environ:  # torchrun numbers by itself, whichever tasks of Slurm it runs in
        return environ.get("RANK") == "0"
    return all(environ.get(name, "0") in ("0", "") for name in (*_RANKS, "NODE_RANK", "GROUP_RANK"))


def rank_name(environ: Mapping[str, str]) -> str:
    """The global rank where the launcher says it, else the rank on this node."""
    return next((environ[name] for name in _RANKS if name in environ), "0")


def is_first_of_node(environ: Mapping[str, str]) -> bool:
    """Whether no other rank of this machine has a lower number, by what launchers set."""
    return environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) in ("0", "")
