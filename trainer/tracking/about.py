"""What a run is besides its config: the machine it trains on, the names of its sources and of its main metrics."""

from __future__ import annotations

import itertools
import json
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from trainer.distributed import gather
from trainer.files import write_whole
from trainer.tracking.runs import ABOUT_FILE


def write_about(trainer: Trainer) -> dict[str, Any]:
    """Writes `run.json` into the run directory: device, ranks, nodes, the metric that stands for each set, and the
    working directory."""
    sets = getattr(getattr(trainer, "datamodule", None), "validation_sets", [])
    about = {
        "device": device_name(trainer.strategy.root_device),
        "ranks": gather.world_size(),
        "nodes": trainer.num_nodes,
        "primary_metrics": list(dict.fromkeys(one.primary_metric for one in sets)),
    }
    # Where the relative paths of the config start, for who reads the run from elsewhere; nothing to log or compare.
    written = {**about, "directory": str(Path.cwd())}
    write_whole(Path(trainer.default_root_dir) / ABOUT_FILE, json.dumps(written, indent=1) + "\n")
    return about


def device_name(device: torch.device) -> str:
    """What a person calls it: the name of a GPU, the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def names_of_sources(trainer: Trainer) -> list[str]:
    """A short, distinct name of each training source, in their order; none where there is only one."""
    sources: list[Any] = getattr(getattr(trainer, "datamodule", None), "train_sources", [])
    names: list[str] = []
    for source in sources if len(sources) > 1 else ():
        name = Path(source.path.rstrip("/")).name.partition(".")[0] or "source"
        others = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(one for one in itertools.chain([name], others) if one not in names))
    return names


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB that this process has held at most, on the host and on a CUDA device; asks neither to wait."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    found = {"train/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        found["train/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
