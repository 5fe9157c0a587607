"""The layout of folders that sentence-transformers 3 to 5 load: 6 moved its modules and renamed their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Those whose weights and meaning did not change. A Router's folder, and modules with names of inputs, did.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "WeightedLayerPooling")
_POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_DENSE = ("in_features", "out_features", "bias", "activation_function")
# transformers 4 has no class of this name; both read tokenizer.json alone.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def rewrite_as_legacy(folder: Path, max_length: int, flag: str = "--legacy") -> None:
    """Give a folder that sentence-transformers 6 has saved the older layout, in place; 6 reads it as well.

    Args:
        max_length: pieces kept of a text.
        flag: what asked for it.

    Raises:
        ValueError: it has a module that older versions do not have, or settings that they do not know.
    """
    modules = _read(folder / "modules.json")
    for module in modules:
        name = module["type"].rpartition(".")[2]
        if not module["type"].startswith("sentence_transformers.") or name not in _MODULES:
            raise ValueError(
                f"{flag}: sentence-transformers 3 to 5 can't load the module {module['type']}; export without it"
            )
        module["type"] = f"sentence_transformers.models.{name}"
        own = folder / module["path"]
        if name == "Transformer":
            lowers = bool(_read(own / "sentence_bert_config.json").get("do_lower_case"))
            _write(own / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lowers})
            _rewrite_tokenizer(own / "tokenizer_config.json")
        elif name == "Pooling":
            _write(own / "config.json", _pooling(_read(own / "config.json")))
        elif name == "Dense":
            config = _read(own / "config.json")
            if config.get("use_residual"):
                raise ValueError(f"{flag}: sentence-transformers 3 to 5 have no Dense with use_residual")
            _write(own / "config.json", {key: config[key] for key in _DENSE})
    _write(folder / "modules.json", modules)


def _pooling(config: dict[str, Any]) -> dict[str, Any]:
    modes = config["pooling_mode"]
    chosen = {modes} if isinstance(modes, str) else set(modes)
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **{key: mode in chosen for mode, key in _POOLING_MODES.items()},
        "include_prompt": config["include_prompt"],
    }


def _rewrite_tokenizer(path: Path) -> None:
    config = _read(path)
    name = config.get("tokenizer_class")
    _write(path, config | {"tokenizer_class": _TOKENIZER_CLASSES.get(name, name)})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
