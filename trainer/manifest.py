"""Checkpoint directories: written whole, checked by sha256, found by their step.

``checkpoints/step-00000022/`` holds ``state.ckpt`` (what Lightning restores, plain types only) and ``manifest.json``
(step, ranks, identity of the run, size and sha256 of every other file and of the manifest itself). A directory has its
name only when all of it is on the disk. The same step once more takes its place by two renames; a kill between them
leaves ``.step-00000022.replaced``, which is read in its stead. ``checkpoints/best.json`` names the step with the best
metric. A run that goes back to an earlier step moves the later ones into ``checkpoints/abandoned``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.files import flush_folder, sha256_of, write_whole
from trainer.messages import cause_of

FORMAT = 1
STATE, MANIFEST, BEST = "state.ckpt", "manifest.json", "best.json"
_REPLACED = ".replaced"
_STEP_NAME = re.compile(r"step-(\d+)")


def write_checkpoint(content: Mapping[str, Any], folder: Path, about: Mapping[str, Any]) -> None:
    """Write a checkpoint directory; an older one of the same name is replaced.

    Args:
        content: plain types and tensors.
        folder: ``checkpoints/step-XXXXXXXX``; appears by a rename, on its own file system, whatever TMPDIR says.
        about: what the manifest says besides the files.

    Raises:
        ValueError: the disk is full or can't be written (says the bytes needed and found), or ``content`` holds more
            than plain types and tensors. Nothing older is touched.
    """
    needed = num_bytes(content)
    parent = _existing(folder.parent)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(_no_room(folder, f"{needed:,} bytes needed, {free:,} free on {parent}"))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        partial.mkdir(parents=True)
        with open(partial / STATE, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        if reason := _unreadable(partial / STATE):
            shutil.rmtree(partial)
            raise ValueError(
                f"checkpoint {folder} would not be read again: {reason}; let state_dict() of your callbacks hold "
                "tensors, numbers, strings, lists and dicts alone"
            )
        files = {STATE: {"bytes": (partial / STATE).stat().st_size, "sha256": sha256_of(partial / STATE)}}
        manifest = {"format": FORMAT, **about, "files": files}
        write_whole(partial / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
        aside = _replaced(folder)
        if folder.exists():
            # The same step once more, for now it is the best; a directory can't be renamed over another. Only renames
            # lie between the two: to remove the older one takes long.
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        os.replace(partial, folder)
        flush_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch's own writer turns a full disk into a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(parent).free
        cause = cause_of(error)
        raise ValueError(_no_room(folder, f"{cause}; {needed:,} bytes needed, {free:,} free on {parent}")) from error


def _unreadable(path: Path) -> str | None:
    """What in a state is neither tensor nor plain type, or None."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds a {kind[1] if kind else 'kind of object'}, which could run code"
    return None


def num_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        return sum(num_bytes(value) for value in content.values())
    if isinstance(content, list | tuple):
        return sum(num_bytes(value) for value in content)
    return 0


def tensor_digest(named: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """sha256 of ``about``, then of the names and bytes of tensors, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _no_room(folder: Path, numbers: str) -> str:
    older = newest(folder.parent.parent)
    kept = f"{older} is intact" if older else "there is no older checkpoint"
    return (
        f"checkpoint {folder} can't be written: {numbers}; {kept}. Make room (checkpoint.keep, another "
        "trainer.default_root_dir) and go on with --ckpt_path auto"
    )


def problem(folder: Path) -> str | None:
    """Why a checkpoint directory can't be trusted, or None. Reads every byte of it."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, expected in manifest["files"].items():
        path = lies_at(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, {expected['bytes']:,} were written"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} is not what was written (sha256 differs)"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    try:
        manifest = json.loads((lies_at(folder) / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} can't be read") from error
    if digest != _digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written (sha256 differs)")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest['format']}, this version reads {FORMAT}")
    return dict(manifest)


def read_state(folder: Path, **options: Any) -> dict[str, Any]:
    """What `write_checkpoint` was given; ``options`` go to ``torch.load``. No code in it is ever run.

    Raises:
        ValueError: it can't be read, or holds more than tensors and plain types.
    """
    try:
        content = torch.load(lies_at(folder) / STATE, **{"map_location": "cpu", **options, "weights_only": True})
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{folder / STATE} is refused: it holds more than tensors and plain types, which could run code; "
            "take a checkpoint that a fit wrote"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        cause = cause_of(error)
        raise ValueError(f"{folder / STATE} can't be read: {cause}; take another checkpoint of its folder") from error
    if not isinstance(content, dict) or not {"state_dict", "global_step"} <= content.keys():
        raise ValueError(f"{folder / STATE} has no state_dict and global_step; give a checkpoint that a fit wrote")
    return content


def steps(run_dir: Path) -> dict[int, Path]:
    """Step -> directory of the finished checkpoints of a run, ascending; not yet verified."""
    folder = run_dir / "checkpoints"
    names = {path.name for path in folder.glob("step-*") if path.is_dir()}
    names |= {path.name[1:].removesuffix(_REPLACED) for path in folder.glob(f".step-*{_REPLACED}")}
    return dict(sorted((int(m[1]), folder / name) for name in names if (m := _STEP_NAME.fullmatch(name))))


def lies_at(folder: Path) -> Path:
    """Where the files of a checkpoint are: its folder, or beside it after a kill between two renames."""
    aside = _replaced(folder)
    return aside if aside.is_dir() and not folder.is_dir() else folder


def newest(run_dir: Path) -> Path | None:
    """The checkpoint with the highest step of a run, None where there is none; not yet verified."""
    return next(reversed(steps(run_dir).values()), None)


def newest_valid(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that can be trusted, and why newer ones can't."""
    damaged: dict[Path, str] = {}
    for path in reversed(steps(run_dir).values()):
        reason = problem(path)
        if reason is None:
            return path, damaged
        damaged[path] = reason
    return None, damaged


def drop(folder: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves no half of it under its name.

    What can't be removed stays: on NFS that is a file that somebody has open, and no reason to end a run.
    """
    aside = folder.with_name(f".{folder.name}.dropped")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # what was left of it before is still open
        os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(run_dir: Path) -> None:
    """Put back, or remove, what a kill in the middle of a save has left; only for who holds the run directory."""
    for folder in steps(run_dir).values():
        if not folder.is_dir() and problem(folder) is None:
            os.replace(_replaced(folder), folder)
    for left in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_REPLACED}")


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Move checkpoints behind a step into ``checkpoints/abandoned``; where they lie now."""
    later = [path for number, path in steps(run_dir).items() if number > step]
    aside = run_dir / "checkpoints" / "abandoned"
    for path in later:
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / path.name, ignore_errors=True)
        os.replace(path, aside / path.name)
    return [aside / path.name for path in later]


def mark_best(run_dir: Path, step: int | None) -> None:
    """Write the step of the best checkpoint; None: there is none."""
    if step is None:
        (run_dir / "checkpoints" / BEST).unlink(missing_ok=True)
    else:
        write_whole(run_dir / "checkpoints" / BEST, json.dumps({"step": step}))


def best(run_dir: Path) -> Path | None:
    """The checkpoint with the best monitored metric, None where nothing was monitored.

    Raises:
        ValueError: the file that says so can't be read.
    """
    path = run_dir / "checkpoints" / BEST
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read: {error}; remove it, and the newest checkpoint is taken") from error
    return steps(run_dir).get(step)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
