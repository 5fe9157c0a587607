"""``trainer preflight``: what would fail minutes later, on one node of many, is found in seconds and named.

One line per check. A check is a function of the parsed command: it returns what it found or raises ValueError with
numbers and remedy.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from trainer.config_files import ConfigError, read_command
from trainer.run_dir import is_first_rank
from trainer.tracking.redact import redact_arguments, redact_credentials

if TYPE_CHECKING:
    from trainer.encoder.spec import EncoderSpec
    from trainer.lightning_cli import Parts

LIBRARIES = ("torch", "lightning", "transformers", "sentence_transformers", "datasets")
BYTES = 4  # of a weight or a moment: all are float32


def preflight(args: Sequence[str]) -> int:
    """Checks this node for ``trainer fit ARGS`` and prints a line per check; 0, or 2 where one failed."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if is_first_rank(os.environ):
        print(f"preflight {node}: {shlex.join(['trainer', 'fit', *redact_arguments(args)])}", flush=True)
    if not _report(node, "imports", _check_imports):
        return 2
    built: list[Parts] = []
    if not _report(node, "config", lambda: _check_config(args, built)):
        return 2
    (parts,) = built
    checks: dict[str, Callable[[Parts], str]] = {
        "devices": check_devices,
        "run directory": check_run_directory,
        "backbone": check_backbone,
        "space": check_space,
        "data": check_data,
    }
    passed = [_report(node, name, lambda check=check: check(parts)) for name, check in checks.items()]  # type: ignore[misc]
    return 0 if all(passed) else 2


def _report(node: str, name: str, check: Callable[[], str]) -> bool:
    try:
        verdict, passed = f"ok: {check()}", True
    except (ConfigError, ValueError) as error:
        verdict, passed = f"FAILED: {error}", False
    print(f"preflight {node}: {name} {redact_credentials(verdict)}", flush=True)
    return passed


def _check_imports() -> str:
    for name in (*LIBRARIES, "trainer.lightning_cli"):
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a library without its shared objects, or half installed
            raise ValueError(f"{name}: {error}; is this the environment you meant? TRAINER_ENV names it") from error
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _check_config(args: Sequence[str], built: list[Parts]) -> str:
    from trainer.lightning_cli import Parts

    built.append(Parts(["fit", *args], read_command(args), execute=False))
    return f"run directory {built[0].run_dir}"


def check_devices(parts: Parts) -> str:
    """Ranks of a node against what Slurm starts there and what they see."""
    import torch

    from trainer.data.workers import num_cores
    from trainer.distributed.launch import device_count

    asked, options = os.environ.get("SLURM_NTASKS_PER_NODE", ""), parts.options.trainer
    wanted = device_count(options.devices)
    if asked and wanted and int(asked) != wanted:
        raise ValueError(f"Slurm starts {asked} tasks on a node, trainer.devices is {wanted}; make them equal")
    gpus = torch.cuda.device_count()
    if options.accelerator == "cpu" or (options.accelerator == "auto" and not gpus):
        return f"{wanted or 1} x cpu, {num_cores()} CPUs visible"
    # More than Slurm gave would be somebody else's.
    if gpus == 0 or (wanted and (gpus != wanted if asked else gpus < wanted)):
        raise ValueError(
            f"{gpus} GPUs are visible, {wanted or 'some'} are wanted; compare with nvidia-smi on this node: a dead "
            f"GPU, a driver older than torch {torch.__version__} needs, or CUDA_VISIBLE_DEVICES"
        )
    return f"{gpus} x {torch.cuda.get_device_name(0)}"


def check_run_directory(parts: Parts) -> str:
    """Writes, flushes and reads back: a full quota or a read-only mount often shows no earlier than that."""
    folder, text = parts.run_dir, f"{socket.gethostname()} {os.getpid()}"
    probe = folder / f".preflight-{text.replace(' ', '-')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            found = probe.read_text()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} can't be written: {error.strerror}; mount or free it, or name another place: "
            "--trainer.default_root_dir"
        ) from error
    if found != text:
        raise ValueError(
            f"{folder} gave back {len(found)} of {len(text)} bytes that were written; ask who runs the disk"
        )
    return f"{folder} is written and read"


def check_backbone(parts: Parts) -> str:
    from trainer.encoder.folder import backbone_folder
    from trainer.encoder.weights import refuse_broken_weights

    teachers = [parts.model.teacher_spec, *(source.teacher for source in parts.datamodule.validation_sources)]
    missing = []
    for spec in (*parts.model.encoder_specs, *(one for one in teachers if one is not None)):
        if backbone_folder(spec) is not None:
            refuse_broken_weights(spec)
            continue
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise ValueError(
                f"'{spec.backbone}' is no folder here and not in the cache, and HF_HUB_OFFLINE is set; "
                "on a node with a network: trainer prepare"
            )
        missing.append(f"'{spec.backbone}'")
    if missing:
        names = " and ".join(dict.fromkeys(missing))
        return f"not in the cache: {names}: the start downloads what is missing (trainer prepare does so before)"
    return f"{backbone_folder(parts.model.encoder_spec)}: texts of up to {parts.datamodule.text.max_length} pieces"


def check_space(parts: Parts) -> str:
    """Two checkpoints, since the older one goes when the newer one is whole, and the export."""
    from trainer.encoder.folder import backbone_folder

    specs = parts.model.encoder_specs
    if not all(map(backbone_folder, specs)):
        return "not known before the backbone is here"
    num_moments = 2 if parts.model.optimizer_name == "adamw" else 0
    try:
        written = [count_written(spec, num_moments) for spec in specs]
    except (AttributeError, RuntimeError):
        return "not known for this architecture"
    in_checkpoint, of_pieces, in_export = map(sum, zip(*written, strict=True))
    most = BYTES * (2 * in_checkpoint + in_export)
    # Which pieces the texts use is not known yet: refused is only what can't fit.
    needed = most - BYTES * 2 * of_pieces
    place = next(path for path in (parts.run_dir, *parts.run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place} has {free:,} bytes free, two checkpoints of {in_checkpoint - of_pieces:,} numbers and the export "
            f"of {in_export:,} need {needed:,}; free them, or name another place: --trainer.default_root_dir"
        )
    unknown = f", and up to {most - needed:,} for the pieces that the texts use" if most > needed else ""
    return f"{free:,} bytes free in {place}, {needed:,} needed{unknown}"


def check_data(parts: Parts) -> str:
    from trainer.data.evalsource import EvalSource
    from trainer.data.files import is_hub_id
    from trainer.data.layouts import source_files
    from trainer.data.loading import fingerprint
    from trainer.data.retrieval import collections_fingerprint

    num_files, num_bytes, num_hub = 0, 0, 0
    for source in (*parts.datamodule.train_sources, *parts.datamodule.validation_sources):
        if source.streaming:
            fingerprint(source)  # reads the footers
        if "://" in source.path or is_hub_id(source.path):
            num_hub += 1
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                searches = isinstance(source, EvalSource) and source.searches
                collections_fingerprint(source) if searches else fingerprint(source)  # only the cache can have it
            continue
        for file in source_files(source):
            try:
                with open(file, "rb") as opened:
                    opened.read(1)
                num_bytes += file.stat().st_size
            except OSError as error:
                raise ValueError(f"{file} can't be read: {error.strerror}; check its rights and the mount") from error
            num_files += 1
    hub = f", {num_hub} sets of the hub" if num_hub else ""
    return f"{num_files} files of {num_bytes:,} bytes{hub}"


def count_written(spec: EncoderSpec, num_moments: int) -> tuple[int, int, int]:
    """Numbers in a checkpoint, how many of them belong to pieces that the texts may not use, and numbers in the export;
    counted without weights.

    Raises:
        ValueError: transformers has no such architecture, or not the layers that ``spec`` names.
        AttributeError, RuntimeError: the architecture can't be built without weights.
    """
    from trainer.encoder.size import meta_backbone
    from trainer.encoder.weights import weight_files

    backbone = meta_backbone(spec)
    parameters = list(backbone.parameters())
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    num_all = sum(p.numel() for p in parameters)
    num_adapters = num_trained if spec.lora is not None else 0  # added to the weights that stay
    # As BaseWeights: what stays as the folder has it is not saved.
    num_saved = num_all if spec.lora is None and spec.freeze is None else num_trained
    heads = (path for files in weight_files(spec)[1:] for path in files)
    num_head = sum(path.stat().st_size for path in heads) // BYTES
    pieces = backbone.get_input_embeddings().weight
    is_compact = spec.compact_vocabulary == "auto" and pieces.requires_grad
    return (
        num_saved + num_moments * num_trained + (1 + num_moments) * num_head,
        (1 + num_moments) * pieces.numel() if is_compact else 0,
        num_all - num_adapters + num_head,
    )
