"""Model folders that can't be trained: each is refused in one sentence, before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.encoder.folder import OWN_MODULES, read_json
from trainer.encoder.spec import EncoderSpec
from trainer.manifest import STATE

# Of sentence-transformers: those that ask no more than the tokens of a stream and where their texts end.
_HEAD_MODULES = ("Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")


def refuse_modules(spec: EncoderSpec, modules: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the folder is no model of ours, begins with no Transformer, holds adapters of peft, has
    modules that are not supported, or brings code that was not allowed.

    Args:
        spec: of the encoder.
        modules: of its modules.json, in their order.
    """
    types = [module["type"] for module in modules]
    _refuse_other_folders(spec, types[0])
    _refuse_adapters(spec, modules[0]["path"])
    for place, module in enumerate(types[1:], start=1):
        _refuse_module(spec, module, place)
    if not spec.trust_remote_code:
        _refuse_code(spec, modules[0]["path"], types)


def refuse_settings(spec: EncoderSpec, transformer: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of the Transformer of sentence-transformers that are not followed here."""
    for name in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
        if transformer.get(name):
            raise ValueError(
                f"model.encoder.backbone '{spec.backbone}': its sentence-transformers settings have {name} "
                f"({json.dumps(transformer[name])}), which is not supported; take it out of its "
                "sentence_bert_config.json and set the lengths in the config"
            )
    if "message" in transformer["modality_config"]:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' puts texts into a chat template (message in modality_config of "
            "sentence_bert_config.json), which is not supported: delete message there if it was trained on bare texts"
        )
    text = transformer["modality_config"].get("text") or {}
    asked = [text.get("method"), text.get("method_output_name"), transformer.get("module_output_name")]
    supported = ["forward", "last_hidden_state", "token_embeddings"]
    if asked != supported:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' gives texts {json.dumps(asked)} (method and method_output_name "
            "in modality_config, module_output_name: sentence_bert_config.json), which is not supported; take a model "
            f"that gives them {json.dumps(supported)}"
        )


def _refuse_other_folders(spec: EncoderSpec, first_module: str) -> None:
    """Folders that people take for a model of ours, in words that say what to name instead."""
    folder = Path(spec.backbone)
    if (folder / STATE).is_file():
        best = folder.resolve().parent.parent / "model"
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' is a checkpoint of a fit, not a model folder: "
            f"{f'name {best}, which its run has written, or ' * best.is_dir()}make one with trainer export "
            f"{spec.backbone} OUT, and name OUT"
        )
    kind = first_module.rpartition(".")[2]
    if first_module.startswith(OWN_MODULES) and kind not in ("", "Transformer"):
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' begins with a {kind} of sentence-transformers (modules.json); "
            "take a model that begins with a Transformer"
        )


def _refuse_adapters(spec: EncoderSpec, subfolder: str) -> None:
    """sentence-transformers adds them to their base while it runs, and here they would be trained beside it."""
    adapters = read_json(spec, "adapter_config.json", subfolder)
    if adapters is not None:
        base = adapters.get("base_model_name_or_path")
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' holds adapters of peft (adapter_config.json) for '{base}', "
            "which are not taken: merge them (PeftModel.from_pretrained(base, adapters).merge_and_unload() of peft), "
            "save model and tokenizer, and name that folder"
        )


def _refuse_module(spec: EncoderSpec, module: str, place: int) -> None:
    """One that would be skipped, or let texts leak into their neighbours in the stream."""
    kind = module.rpartition(".")[2]
    if module.startswith(OWN_MODULES) and kind not in _HEAD_MODULES:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' has a {kind} of sentence-transformers as module {place} (from "
            "0, modules.json), which is not supported; take a model that has only these behind its Transformer: "
            + ", ".join(_HEAD_MODULES)
        )


def _refuse_code(spec: EncoderSpec, subfolder: str, module_types: Sequence[str]) -> None:
    """Names the code that comes with a model. transformers would leave it aside in silence where it knows the type of
    the model, and embed with other layers than the author's."""
    code = {name for name in module_types if not name.startswith(OWN_MODULES)}
    for file in ("config.json", "tokenizer_config.json"):
        for found in ((read_json(spec, file, subfolder) or {}).get("auto_map") or {}).values():
            code |= {name for name in (found if isinstance(found, list) else [found]) if name}
    if code:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' brings Python code of its own ({', '.join(sorted(code))}), "
            "which is not run: read it, then set model.encoder.trust_remote_code to true"
        )
