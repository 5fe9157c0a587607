"""The folder of a backbone: where it lies, and what its small files say; no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sentence_transformers.util import load_file_path
from transformers import AutoConfig, PretrainedConfig

from trainer.encoder.spec import EncoderSpec

OWN_MODULES = "sentence_transformers."


def backbone_folder(spec: EncoderSpec) -> Path | None:
    """The folder that was named, or its snapshot in the hub's cache; None where there is neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(spec.backbone).is_dir():
        return Path(spec.backbone)
    try:
        return Path(snapshot_download(spec.backbone, revision=spec.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def public_name(specs: Sequence[EncoderSpec]) -> str:
    """Of hub ids the ids; of a folder its name, for the path is private."""
    return " and ".join(Path(spec.backbone).name if Path(spec.backbone).is_dir() else spec.backbone for spec in specs)


def read_config(spec: EncoderSpec) -> PretrainedConfig:
    """config.json of the backbone, wherever in a sentence-transformers folder it lies; no weights."""
    return AutoConfig.from_pretrained(
        spec.backbone,
        subfolder=read_modules(spec)[0]["path"],
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )


def normalizes(spec: EncoderSpec) -> bool:
    """Whether embeddings will have length 1: what the config says, else what the folder does."""
    if isinstance(spec.normalize, bool):
        return spec.normalize
    return bool(ending_normalizes([module["type"] for module in read_modules(spec)]))


def ending_normalizes(kinds: Sequence[str]) -> list[int]:
    """Places of each Normalize that gives embeddings their length: one before a Dense, say, does not."""
    first = len(kinds)
    while first and kinds[first - 1].endswith(("Normalize", "Dropout")):
        first -= 1
    return [place for place in range(first, len(kinds)) if kinds[place].endswith("Normalize")]


def read_prompts(spec: EncoderSpec) -> dict[str, str]:
    """The prompts that come with a model, by name."""
    return (read_json(spec, "config_sentence_transformers.json") or {}).get("prompts") or {}


def read_routes(spec: EncoderSpec) -> dict[str, list[dict[str, Any]]]:
    """Path and type of the modules of each route of a Router, or of its older name Asym; empty for any other model."""
    first = (read_json(spec, "modules.json") or [{"type": ""}])[0]
    if first["type"].rpartition(".")[2] not in ("Router", "Asym"):
        return {}
    config = read_json(spec, "router_config.json", first["path"]) or read_json(spec, "config.json", first["path"])
    return {
        route: [{"path": str(PurePosixPath(first["path"], name)), "type": config["types"][name]} for name in names]
        for route, names in config["structure"].items()
    }


def read_modules(spec: EncoderSpec) -> list[dict[str, Any]]:
    """Path and type of the modules of the encoder, in their order; of a Router those of the route that is asked for.

    Raises:
        ValueError: there is no such route, or none was asked for.
    """
    modules = read_json(spec, "modules.json") or [{"path": "", "type": OWN_MODULES}]
    routes = read_routes(spec)
    if not routes:
        if spec.route is not None:
            raise ValueError(
                f"model.encoder.route is '{spec.route}', but '{spec.backbone}' has one encoder for all texts: "
                "leave route out"
            )
        return modules
    if spec.route not in routes:
        asked = "unset" if spec.route is None else f"'{spec.route}'"
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' has an encoder for each of {', '.join(routes)} (a Router of "
            f"sentence-transformers), but model.encoder.route is {asked}; name one of them, or train both: encoder and "
            "document_encoder of the model, each with this backbone and its route"
        )
    return [*routes[spec.route], *modules[1:]]


def read_transformer(spec: EncoderSpec, subfolder: str) -> dict[str, Any]:
    """What sentence-transformers reads of its Transformer, and what it takes where the folder says nothing."""
    from sentence_transformers.base.modules import Transformer

    return Transformer.load_config(spec.backbone, subfolder=subfolder, revision=spec.revision)


def embedding_dimension(spec: EncoderSpec) -> int:
    """Of the embeddings: what the folder's last Dense or Pooling gives, else the width of the backbone."""
    for module in reversed(read_modules(spec)):
        kind = module["type"].rpartition(".")[2]
        if kind == "Dense":
            return read_json(spec, "config.json", module["path"])["out_features"]
        if kind == "Pooling" and spec.pooling == "auto":  # several modes stand side by side
            from sentence_transformers.sentence_transformer.modules import Pooling

            pooling = Pooling.load(spec.backbone, subfolder=module["path"], revision=spec.revision)
            return pooling.get_embedding_dimension()
    return read_config(spec).hidden_size


def read_json(spec: EncoderSpec, name: str, subfolder: str = "") -> Any:
    """What a file of the folder says; None where there is no such file."""
    path = load_file_path(spec.backbone, name, subfolder=subfolder, revision=spec.revision)
    if path is None:
        return None
    return _parsed(spec, Path(path))


def refuse_broken_json(spec: EncoderSpec, pattern: str = "*config*.json") -> None:
    """Reads files of a folder that others read later, and would not name; those of hub ids once they are here.

    Raises:
        ValueError: one is cut short or damaged.
    """
    folder = backbone_folder(spec)
    if folder is None:
        return
    for place in dict.fromkeys([folder, *(folder / module["path"] for module in read_modules(spec))]):
        for path in sorted(place.glob(pattern)):
            _parsed(spec, path)


def _parsed(spec: EncoderSpec, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of bytes that are no text too
        raise ValueError(
            f"{path} is no JSON file ({path.stat().st_size:,} bytes, {error}); {fetch_again(spec, path)}"
        ) from error


def fetch_again(spec: EncoderSpec, path: Path) -> str:
    """What to do about a damaged file. Of a hub id the blob must go, or the cache would link it again."""
    if Path(spec.backbone).is_dir():
        return "copy it again"
    return f"remove {path.resolve()}, and fetch it again with trainer prepare"
