"""Ranks of a command that trains nothing, started as those of fit: processes of this machine, or tasks of Slurm."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from subprocess import Popen
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy

from trainer import interruption
from trainer.distributed.meeting import Meeting

Accelerator = Literal["auto", "cpu", "gpu"]
# Ranks meet between pieces of work that may take hours; the loss of one shows in other ways, and sooner.
_TIMEOUT = timedelta(days=1)


def start_ranks(accelerator: Accelerator, devices: int | None, nodes: int | None) -> torch.device:
    """Starts the other ranks, each with this command line, and joins them; returns the device of this one.

    Under srun the ranks are there, and their number is known; else ``devices`` of this machine (all GPUs, or one
    process without any). The process group is gloo's on GPUs too: only numbers and sentences go between the ranks.

    Raises:
        ValueError: no such devices, or Slurm has started another number of ranks.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it announces every rank
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
        fabric = _fabric(accelerator, devices, nodes)
        meeting = Meeting(fabric.strategy) if fabric.world_size > 1 else None
        fabric.launch()
    if children := getattr(fabric.strategy.launcher, "procs", []):
        threading.Thread(target=_watch, args=(children,), name="ranks", daemon=True).start()
    if meeting is not None:
        meeting.end()
    return fabric.device


def _fabric(accelerator: Accelerator, devices: int | None, nodes: int | None) -> Fabric:
    if is_slurm_step():
        devices, nodes = slurm_shape(os.environ, devices, nodes)
    gpus = torch.cuda.device_count() if accelerator != "cpu" else 0
    if accelerator == "gpu" and not gpus:
        raise ValueError(f"--accelerator gpu: torch {torch.__version__} sees no GPU here; compare with nvidia-smi")
    if devices is not None and gpus and devices > gpus:
        raise ValueError(f"--devices is {devices}, but {gpus} GPUs are visible; give {gpus} or less")
    num_devices, num_nodes = devices or gpus or 1, nodes or 1
    return Fabric(
        accelerator="gpu" if gpus else "cpu",
        devices=num_devices,
        num_nodes=num_nodes,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=_TIMEOUT) if num_devices * num_nodes > 1 else "auto",
        plugins=numbering(),
    )


def device_count(devices: int | str | Sequence[int]) -> int | None:
    """How many ``trainer.devices`` names on each node: a number, or GPUs by their ids ("0,1"); None of -1 and "auto",
    all there are."""
    if not isinstance(devices, int | str):
        return len(devices)
    text = str(devices).strip("[] ")
    if "," in text:
        return len([one for one in text.split(",") if one.strip()])
    return int(text) if text.isdigit() else None


def is_slurm_step() -> bool:
    """Whether the tasks of Slurm are the ranks: not those of torchrun, which numbers its own inside a task.

    Lightning leaves out all jobs that are called interactive, as salloc calls them, or bash: each task of a step in
    there would train on its own, in the folder of the others. Several tasks are ranks whatever the job is called; only
    behind a shell (srun --pty) there is one process, however many tasks stand beside it.
    """
    if TorchElasticEnvironment.detect() or "SLURM_PROCID" not in os.environ:  # the shell of salloc is no task
        return False
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    return SLURMEnvironment.detect() or (tasks > 1 and "SLURM_PTY_PORT" not in os.environ)


def numbering() -> list[Any]:
    """Plugins that say who numbers the ranks, where Lightning would be wrong about Slurm.

    Raises:
        ValueError: as `slurm_shape`.
    """
    if is_slurm_step():
        slurm_shape(os.environ, None, None)
        # Lightning's requeue waits for all ranks inside a signal handler, and deadlocks (#21406)
        return [SLURMEnvironment(auto_requeue=False)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [LightningEnvironment()]  # the shell of salloc has Slurm's variables, but is no task
    return []


def slurm_shape(environ: Mapping[str, str], devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Tasks per node and nodes of the Slurm step that this process is a task of.

    Raises:
        ValueError: the flags say something else, tasks lie unevenly on the nodes, their number is not known, or nobody
            has started them.
    """
    counts = {"SLURM_NTASKS": environ.get("SLURM_NTASKS", ""), "SLURM_NNODES": environ.get("SLURM_NNODES", "1")}
    for name, count in counts.items():
        if not re.fullmatch(r"0*[1-9]\d*", count):
            raise ValueError(
                f"{name} is '{count}' in the environment of a task of Slurm; it must be a number: start this with "
                "srun, which sets it, or unset SLURM_PROCID"
            )
    tasks, num_nodes = map(int, counts.values())
    if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environ:
        raise ValueError(
            f"the job has {tasks} tasks, but its script is one process, which would wait for the others: start this "
            "with srun, or submit slurm/train.sh"
        )
    if tasks % num_nodes or (tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environ):
        raise ValueError(f"Slurm has started {tasks} tasks on {num_nodes} nodes; ask for them with --ntasks-per-node")
    found = tasks // num_nodes, num_nodes
    for flag, given, there in zip(("--devices", "--nodes"), (devices, nodes), found, strict=True):
        if given is not None and given != there:
            raise ValueError(f"{flag} is {given}, but Slurm has started {there}: leave the flag out under srun")
    return found


def slurm_flags(given: Collection[str]) -> list[str]:
    """Devices and nodes of a Trainer in this Slurm step, as the flags that slurm/train.sh gives a fit; none without
    Slurm.

    Args:
        given: keys that have a flag already, which wins.

    Raises:
        ValueError: as `slurm_shape`.
    """
    if not is_slurm_step():
        return []
    devices, nodes = slurm_shape(os.environ, None, None)
    found = {"trainer.devices": devices, "trainer.num_nodes": nodes}
    return [f"--{key}={number}" for key, number in found.items() if key not in given]


def _watch(children: Sequence[Popen[bytes]]) -> None:
    """A rank that fails ends the others: its part of the work is missing."""
    fine = (0, *interruption.EXIT_CODES.values())
    while True:
        for rank, child in enumerate(children, 1):
            code = child.poll()
            if code is not None and code not in fine:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has failed with exit code {code}"
                print(
                    f"error: rank {rank} {how}; what is finished is kept, and the same command goes on from there",
                    file=sys.stderr,
                    flush=True,
                )
                for other in children:
                    other.kill()
                os._exit(1)  # the main thread may wait in C++ for that rank
        time.sleep(0.2)
