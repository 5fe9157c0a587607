"""The layout of folders that sentence-transformers 3 to 5 load: 6 moved its modules and renamed their settings, and
transformers 5, which it needs, renamed some of the backbone's and the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Those whose weights and meaning did not change. A Router's folder, and modules with names of inputs, did.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
# In the order in which older versions put several modes side by side.
_POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_DENSE = ("in_features", "out_features", "bias", "activation_function")
# Those that 6 can tell what to read and what to write; older versions know the embedding of the text alone.
_NAMED = ("Dense", "Normalize")
# transformers 4 has no class of this name; both read tokenizer.json alone.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# Where rotary positions differ by type of layer: transformers 4's names of their bases. Elsewhere it is rope_theta.
_ROPE_BASES = {
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
}
# Backbones whose rotary settings had names of their own in transformers 4.
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_ROPE_NAMES = {"gpt_neox": _GPT_NEOX, "gpt_neox_japanese": _GPT_NEOX}


def rewrite_as_legacy(folder: Path, max_length: int, flag: str = "--legacy") -> None:
    """Give a folder that sentence-transformers 6 has saved the older layout, in place; 6 reads it as well.

    Args:
        max_length: pieces kept of a text.
        flag: what asked for it.

    Raises:
        ValueError: it has a module that older versions do not have, or settings that they or transformers 4 do not
            know.
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
        if name in _NAMED:
            _refuse_other_names(name, _read(own / "config.json"), flag)
        if name == "Transformer":
            lowers = bool(_read(own / "sentence_bert_config.json").get("do_lower_case"))
            _write(own / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lowers})
            config = _read(own / "config.json")
            if config.get("is_causal") is False:
                raise ValueError(
                    f"{flag}: transformers 4, which sentence-transformers 3 to 5 need, takes no notice of is_causal: "
                    f"false, and a piece of this '{config['model_type']}' would see no later ones; export without it"
                )
            _write(own / "config.json", config | _rotary(config, flag) | _window_pattern(config, flag))
            _rewrite_tokenizer(own / "tokenizer_config.json")
        elif name == "Pooling":
            _write(own / "config.json", _pooling(_read(own / "config.json"), flag))
        elif name == "Dense":
            config = _read(own / "config.json")
            if config.get("use_residual"):
                raise ValueError(f"{flag}: sentence-transformers 3 to 5 have no Dense with use_residual")
            _write(own / "config.json", {key: config[key] for key in _DENSE})
    _write(folder / "modules.json", modules)


def _refuse_other_names(kind: str, config: dict[str, Any], flag: str) -> None:
    names = [config.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")]
    if names != ["sentence_embedding"] * 2:
        raise ValueError(
            f"{flag}: this model has a {kind} from {names[0]} to {names[1]}, and sentence-transformers 3 to 5 have "
            "only those of sentence_embedding; export without it"
        )


def _pooling(config: dict[str, Any], flag: str) -> dict[str, Any]:
    modes = config["pooling_mode"]
    chosen = [modes] if isinstance(modes, str) else list(modes)
    older = [mode for mode in _POOLING_MODES if mode in chosen]
    if chosen != older:
        raise ValueError(
            f"{flag}: this model pools {', '.join(chosen)} in this order, and sentence-transformers 3 to 5 put them "
            f"side by side as {', '.join(older)}; export without it"
        )
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **{key: mode in chosen for mode, key in _POOLING_MODES.items()},
        "include_prompt": config["include_prompt"],
    }


def _rotary(config: dict[str, Any], flag: str) -> dict[str, Any]:
    """What rope_parameters says in the keys of transformers 4, which takes its defaults where it finds none of them."""
    rope = config.get("rope_parameters") or {}
    by_layer = {layer: one for layer, one in rope.items() if isinstance(one, dict)}
    if by_layer:
        kind = config["model_type"]
        names = _ROPE_BASES.get(kind, {})
        if by_layer.keys() != names.keys() or any(one["rope_type"] != "default" for one in by_layer.values()):
            raise ValueError(
                f"{flag}: transformers 4, which sentence-transformers 3 to 5 need, can't be told the rotary positions "
                f"of this '{kind}', {rope}; export without it"
            )
        return {names[layer]: one["rope_theta"] for layer, one in by_layer.items()}
    names = _ROPE_NAMES.get(config["model_type"], {})
    keys = [key for key in ("rope_theta", "partial_rotary_factor") if key in rope]
    found = {names.get(key, key): rope[key] for key in keys}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key not in keys}
    return found


def _window_pattern(config: dict[str, Any], flag: str) -> dict[str, Any]:
    """Which layers of a ModernBERT see the whole text; transformers 4 knows no layer_types of it, only each n-th."""
    if config["model_type"] != "modernbert":
        return {}
    sees_all = [layer == "full_attention" for layer in config["layer_types"]]
    every = next((i for i, whole in enumerate(sees_all) if i and whole), len(sees_all))
    if sees_all != [i % every == 0 for i in range(len(sees_all))]:
        raise ValueError(
            f"{flag}: transformers 4, which sentence-transformers 3 to 5 need, lets each n-th layer of a 'modernbert' "
            f"see the whole text, and of this one others do: {config['layer_types']}; export without it"
        )
    return {"global_attn_every_n_layers": every}


def _rewrite_tokenizer(path: Path) -> None:
    config = _read(path)
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = _TOKENIZER_CLASSES.get(name, name)
    # transformers 4 has another thing of this name, tokens by their attributes, and fails at a list.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write(path, config)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
