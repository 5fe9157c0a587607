"""Which weights of a backbone get a gradient: frozen layers, and low-rank adapters in place of all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from trainer.encoder.spec import EncoderSpec, LoRA

_ADAPTER = "default"
# Parts that no forward of ours takes: Longformer's global attention, XLNet's masked pieces and kinds of segments
# (which its tokenizer may tell apart: they stay as they are), LUKE's entities, what ESM predicts contacts by,
# VisualBERT's images.
_UNUSED = {
    *("query_global", "key_global", "value_global"),
    *("mask_emb", "r_s_bias", "seg_embed"),
    *("entity_embeddings", "w2e_query", "e2w_query", "e2e_query"),
    "contact_head",
    *("visual_projection", "visual_position_embeddings", "visual_token_type_embeddings"),
}
# Ends the names of the classes whose table transformers computes and looks up without a gradient (RoFormer, Marian).
_COMPUTED = "SinusoidalPositionalEmbedding"


def restrict(backbone: PreTrainedModel, spec: EncoderSpec, head: nn.Module | None = None) -> None:
    """Leave a gradient to the weights that ``spec`` trains, and put its adapters in.

    Args:
        backbone: whose weights they are.
        spec: which of them are trained.
        head: what stands behind the backbone; frozen where all layers are.

    Raises:
        ValueError: more frozen layers than there are, or adapters for layers that are not there.
    """
    # BERT's pooler is not part of the embedding: a parameter without gradient would stall DDP.
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if _is_unused(name):
            parameter.requires_grad_(False)
    for module in backbone.modules():
        if type(module).__name__.endswith(_COMPUTED):
            module.requires_grad_(False)
    if spec.freeze is not None:
        _freeze(backbone, spec.freeze, head)
    if spec.lora is not None:
        _add_adapters(backbone, spec.lora, spec.freeze or 0)


def blocks(backbone: PreTrainedModel) -> nn.ModuleList:
    """The layers of attention and feed-forward, in their order."""
    wanted = backbone.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(
        f"'{backbone.config.model_type}' has no list of {wanted} layers, which model.encoder.freeze, lora and "
        "compile_layers need: leave them out"
    )


def _is_unused(name: str) -> bool:
    return not _UNUSED.isdisjoint(name.split("."))


def _is_linear(module: nn.Module) -> bool:
    """Whether it gives W x + b. Some classes of linear layers make more of it: a router's choice (Llama 4, PhiMoE), a
    product for each group (DeepSeek-V4); Falcon's only adds b in a step of its own."""
    own = type(module)
    return isinstance(module, nn.Linear) and (own.forward is nn.Linear.forward or own.__name__ == "FalconLinear")


def _freeze(backbone: PreTrainedModel, num_layers: int, head: nn.Module | None) -> None:
    layers = blocks(backbone)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"model.encoder.freeze is {num_layers}, but '{backbone.config.model_type}' has {len(layers)} layers; "
            f"give 0 (the embeddings alone) to {len(layers)}"
        )
    if num_layers == len(layers):  # the embeddings shall stay: a last norm, shared positions and the head too
        backbone.requires_grad_(False)
        if head is not None:
            head.requires_grad_(False)
        return
    # Positions and the first norm, where they stand beside the pieces.
    embeddings = getattr(backbone, "embeddings", backbone.get_input_embeddings())
    widened = getattr(backbone, "embeddings_project", None)  # ELECTRA's, to the width of the layers
    for module in (embeddings, *filter(None, [widened]), *layers[:num_layers]):
        module.requires_grad_(False)


def _add_adapters(backbone: PreTrainedModel, lora: LoRA, num_frozen: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # takes a second, which others need not wait

    layers = blocks(backbone)
    frozen = {id(module) for layer in layers[:num_frozen] for module in layer.modules()}
    inside = {id(module) for layer in layers for module in layer.modules()}
    linear = {
        name: name.rpartition(".")[2]
        for name, module in backbone.named_modules()
        if _is_linear(module) and id(module) in inside and not _is_unused(name)
    }
    if not linear:
        raise ValueError(
            f"model.encoder.lora adapts linear layers (torch.nn.Linear), and the layers of "
            f"'{backbone.config.model_type}' have none: leave lora out; freeze leaves the first layers as they are"
        )
    if lora.target_modules != "auto":
        for target in lora.target_modules:
            if target not in linear.values():
                raise ValueError(
                    f"model.encoder.lora.target_modules has '{target}', which no linear layer of "
                    f"'{backbone.config.model_type}' is called; there are {', '.join(dict.fromkeys(linear.values()))}"
                )
        linear = {name: last for name, last in linear.items() if last in lora.target_modules}
    targets = [name for name in linear if id(backbone.get_submodule(name)) not in frozen]
    if not targets:
        raise ValueError(
            f"model.encoder.freeze is {num_frozen}: all {len(layers)} layers are frozen, and none is left to adapt; "
            "lower it, or leave lora out"
        )
    # Takes the gradient from every weight that is no adapter's.
    inject_adapter_in_model(
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets),
        backbone,
        adapter_name=_ADAPTER,
    )
    del backbone.peft_config  # names the folder of the backbone


@contextmanager
def merged_adapters(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside the block a plain linear layer, W + alpha / r B A, stands for every adapted one (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685). Behind it the adapted ones are what they were, bit for bit: nothing is
    subtracted."""
    from peft.tuners.lora import Linear

    adapted = [
        (parent, name, layer)
        for parent in list(backbone.modules())
        for name, layer in parent.named_children()
        if isinstance(layer, Linear)
    ]
    for parent, name, layer in adapted:
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        plain.weight = nn.Parameter((base.weight + layer.get_delta_weight(_ADAPTER)).detach())
        if base.bias is not None:
            plain.bias = base.bias
        setattr(parent, name, plain)
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)
