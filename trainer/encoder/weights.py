"""The weight files of a backbone's folder: which of them are loaded, whether they are weights, and all of them."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from trainer.encoder.folder import backbone_folder, fetch_again, read_modules
from trainer.encoder.spec import EncoderSpec

_POINTER = b"version https://git-lfs"


def weight_files(spec: EncoderSpec) -> list[list[Path]]:
    """Files that are loaded for each module of the encoder, the backbone first: of several formats the one that
    transformers takes. Empty where a module has none, or nothing is here yet."""
    folder = backbone_folder(spec)
    return [] if folder is None else [_files_of(folder / module["path"]) for module in read_modules(spec)]


def _files_of(folder: Path) -> list[Path]:
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in dict.fromkeys(names)]
    return []


def refuse_broken_weights(spec: EncoderSpec) -> None:
    """Reads the first bytes of each weight file.

    Raises:
        ValueError: one is a git-lfs pointer, or was cut short; or a folder has none.
    """
    files_of_modules = weight_files(spec)
    if files_of_modules and not files_of_modules[0] and _should_have_weights(Path(spec.backbone)):
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' is a folder without weights: neither {SAFE_WEIGHTS_NAME} nor "
            f"{WEIGHTS_NAME} lies beside its config.json; copy the whole folder"
        )
    for path in (path for files in files_of_modules for path in files):
        if cause := _broken(path):
            pull = "run git lfs pull there, or " if Path(spec.backbone).is_dir() else ""
            raise ValueError(
                f"{path} is no weight file ({path.stat().st_size:,} bytes, {cause}); {pull}{fetch_again(spec, path)}"
            )


def refuse_missing_weights(spec: EncoderSpec, backbone: PreTrainedModel) -> None:
    """For who trains nothing: transformers draws what the files lack, and each rank draws for itself.

    Args:
        spec: of the encoder.
        backbone: of the encoder, as it was loaded.

    Raises:
        ValueError: the files lack weights that an embedding needs.
    """
    ignored = backbone._keys_to_ignore_on_load_missing or ()  # computed, as sinusoids are
    weights = dict(backbone.named_parameters())
    missing = [
        name
        for name, weight in weights.items()
        # Poolers and what else no forward takes get no gradient.
        if weight.requires_grad
        and not getattr(weight, "_is_hf_initialized", False)  # transformers says so of each that it has read
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}': its files lack {len(missing)} of {len(weights)} weights "
            f"({missing[0]}{', ...' * (len(missing) > 1)}), which would be random; copy the whole folder, or train it "
            "first"
        )


def _should_have_weights(folder: Path) -> bool:
    """A folder on this machine; one of adapters alone names where its weights are."""
    return folder.is_dir() and not any(folder.rglob("adapter_config.json"))


def _broken(path: Path) -> str | None:
    """What is wrong with a file; None where nothing is, or where transformers says it well."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        return "a git-lfs pointer"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError:
            return "cut short or damaged"
    elif not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):  # torch.save writes a zip file
        return "cut short or damaged"
    return None
