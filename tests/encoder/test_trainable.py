"""What is frozen stays, what adapts is added in at the end, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ElectraConfig,
    EsmConfig,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    LongformerConfig,
    LukeConfig,
    M2M100Config,
    PhimoeConfig,
    PreTrainedConfig,
    RoFormerConfig,
    T5Config,
    VisualBertConfig,
    XLNetConfig,
)

from tests.batches import gradients_of, largest_difference
from trainer.check.memory import estimate
from trainer.data.collate import pack_texts
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.flops import count_arithmetic
from trainer.encoder.size import UNCOUNTED, backbone_size
from trainer.encoder.spec import LoRA
from trainer.encoder.trainable import blocks, restrict

TEXTS = ["The doctor bought the car at the shop.", "a", "In winter, at dusk, the physician purchased a vehicle."]
TWO_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "pad_token_id": 0, **TWO_LAYERS}
KINDS = ("bert", "mpnet", "distilbert", "modernbert", "qwen3")


def _load(folder: Path, max_tokens: int = 4096, **spec: Any) -> Encoder:
    return Encoder(EncoderSpec(str(folder), dropout=0.0, **spec), max_tokens).train()


def _embed(encoder: Encoder) -> Tensor:
    return encoder.embed(pack_texts(encoder.text(TEXTS)))


def _step(encoder: Encoder, rate: float = 0.1) -> dict[str, Tensor]:
    """One SGD step of a function whose gradient differs at every element; returns the gradients."""
    embeddings = _embed(encoder)
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = gradients_of(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
                parameter.grad = None
    return gradients


def _trained(encoder: Encoder) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_are_trained_and_merge_into_the_folder(
    tiny_encoders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Fresh adapters change nothing; after steps the exported folder, which knows no adapter, embeds as we do; and
    behind the export the weights are what they were, bit for bit."""
    encoder = _load(tiny_encoders[kind], lora=LoRA(r=4, alpha=16))
    assert_close(_embed(encoder), _embed(_load(tiny_encoders[kind])), rtol=0.0, atol=0.0)
    assert all("lora_" in name for name in _trained(encoder))
    encoder.compact_vocabulary(torch.arange(20))
    assert encoder.vocabulary is None
    for _ in range(3):
        gradients = _step(encoder)
    assert gradients.keys() == _trained(encoder)
    assert all(gradient.any() for gradient in gradients.values())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "model"))
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        ours, base = _embed(encoder.eval()), _embed(_load(tiny_encoders[kind]).eval())
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_close(exported.encode(TEXTS, convert_to_tensor=True), ours, rtol=0.0, atol=1e-5)
    assert not [name for name, _ in exported.named_parameters() if "lora" in name]
    assert float((ours - base).abs().max()) > 1e-2, "adapters that learnt nothing"


def test_adapters_where_they_are_asked_for(tiny_encoder: Path) -> None:
    encoder = _load(tiny_encoder, lora=LoRA(r=2, target_modules=["query", "value"]), freeze=1)
    names = {name.split(".lora_")[0] for name in _trained(encoder)}
    assert names == {f"backbone.encoder.layer.1.attention.self.{name}" for name in ("query", "value")}
    message = r"lora.target_modules has 'q_proj', which no linear layer of 'bert' is called; there are query, key,"
    with pytest.raises(ValueError, match=message):
        _load(tiny_encoder, lora=LoRA(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="freeze is 2: all 2 layers are frozen, and none is left to adapt"):
        _load(tiny_encoder, lora=LoRA(), freeze=2)
    with pytest.raises(ValueError, match="r 0 and alpha 32; both must be 1 or more"):
        LoRA(r=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(tiny_encoders: dict[str, Path], kind: str) -> None:
    """As without freezing, also in chunks; and no backward runs through the frozen layers."""
    frozen, free = _load(tiny_encoders[kind], freeze=1), _load(tiny_encoders[kind])
    chunked = _load(tiny_encoders[kind], max_tokens=10, freeze=1)
    output: list[Tensor] = []
    blocks(frozen.backbone)[0].register_forward_hook(lambda *args: output.append(args[-1]))
    gradients, all_gradients, in_chunks = _step(frozen), _step(free), _step(chunked)
    assert gradients.keys() == in_chunks.keys() == _trained(frozen)
    layer_0 = {name for name in all_gradients if any(part in name for part in ("layer.0.", "layers.0.", "embed"))}
    assert all_gradients.keys() - gradients.keys() == layer_0
    assert largest_difference(gradients, {name: all_gradients[name] for name in gradients}) < 1e-6
    assert largest_difference(in_chunks, gradients) < 1e-6
    hidden = output[0][0] if isinstance(output[0], tuple) else output[0]
    assert hidden.requires_grad == (kind == "mpnet")  # its layers share one table of relative positions


def test_embeddings_are_frozen_with_what_widens_them() -> None:
    """ELECTRA's small ones are 128 wide: else a backward would run through the frozen layers."""
    backbone = AutoModel.from_config(ElectraConfig(embedding_size=8, **SMALL))
    restrict(backbone, EncoderSpec("x", freeze=1))
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("encoder.layer.1.") for name in trained)


def test_frozen_embeddings_alone_and_too_many_layers(tiny_encoder: Path) -> None:
    encoder = _load(tiny_encoder, freeze=0)
    assert {name.split(".")[1] for name in _trained(encoder)} == {"encoder"}
    with pytest.raises(ValueError, match=r"freeze is 3, but 'bert' has 2 layers; give 0 \(the embeddings alone\) to 2"):
        _load(tiny_encoder, freeze=3)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_layers_frozen_nothing_is_trained(tiny_encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Neither a last norm, nor shared positions, nor a Dense behind the pooling: a step leaves the embeddings alone."""
    plain = SentenceTransformer(str(tiny_encoders[kind]), device="cpu")
    modules: list[Any] = [*plain, Dense(32, 12)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    assert _trained(_load(tmp_path, freeze=2)) == set()
    assert {name.split(".")[0] for name in _trained(_load(tmp_path, freeze=1))} == {"backbone", "head"}
    assert backbone_size(EncoderSpec(str(tmp_path), freeze=2)).num_trained == 0


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["all", "lora"])
@pytest.mark.parametrize(
    "config",
    [
        LongformerConfig(vocab_size=50, hidden_size=16, intermediate_size=16, attention_window=4, **TWO_LAYERS),
        XLNetConfig(vocab_size=50, d_model=16, d_inner=16, n_layer=2, n_head=2),
        RoFormerConfig(vocab_size=50, hidden_size=16, intermediate_size=16, **TWO_LAYERS),
        LukeConfig(vocab_size=50, hidden_size=16, intermediate_size=16, entity_vocab_size=5, **TWO_LAYERS),
        EsmConfig(vocab_size=50, hidden_size=16, intermediate_size=16, pad_token_id=0, mask_token_id=1, **TWO_LAYERS),
        VisualBertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, visual_embedding_dim=8, **TWO_LAYERS),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_trained_gets_a_gradient(tmp_path: Path, config: PreTrainedConfig, lora: LoRA | None) -> None:
    """Else DistributedDataParallel refuses the second step. Loaded, for that gives a gradient to what had none."""
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    restrict(backbone, EncoderSpec("x", lora=lora))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    hidden = backbone(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    hidden.sin().sum().backward()
    without = [name for name, one in backbone.named_parameters() if one.requires_grad and one.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (Llama4TextConfig(intermediate_size_mlp=16, num_key_value_heads=2, num_local_experts=4, **SMALL), "router"),
        (PhimoeConfig(num_key_value_heads=2, num_local_experts=4, **SMALL), "router"),
        (FalconConfig(**SMALL), None),
    ],
    ids=lambda config: config.model_type if isinstance(config, PreTrainedConfig) else "",
)
def test_adapters_stand_at_layers_that_are_linear(
    tiny_encoder: Path, tmp_path: Path, config: PreTrainedConfig, left_out: str | None
) -> None:
    """Not where a class of linear layers gives a router's choice; and the sum of the two is what was trained."""
    encoder = _load(_save(tmp_path, tiny_encoder, config), max_length=64, lora=LoRA(r=2))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in _trained(encoder)}
    assert adapted
    assert left_out not in adapted
    encoder.eval()
    _step(encoder)
    with torch.no_grad(), encoder.as_sentence_transformer() as model:
        theirs = model.encode(TEXTS, convert_to_tensor=True)
    with torch.no_grad():
        assert_close(_embed(encoder), theirs, rtol=0.0, atol=1e-5)


def test_adapters_of_layers_without_linear_ones() -> None:
    backbone = AutoModel.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"adapts linear layers .* the layers of 'gpt2' have none: leave lora out"):
        restrict(backbone, EncoderSpec("x", lora=LoRA()))


@pytest.mark.parametrize("spec", [{}, {"freeze": 1}, {"lora": LoRA(r=4)}], ids=["all", "freeze", "lora"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_size_counts_what_is_trained(tiny_encoders: dict[str, Path], kind: str, spec: dict[str, Any]) -> None:
    size = backbone_size(EncoderSpec(str(tiny_encoders[kind]), **spec))
    encoder = _load(tiny_encoders[kind], **spec)
    assert size.num_parameters == sum(p.numel() for p in encoder.backbone.parameters())
    assert size.num_trained == sum(p.numel() for p in encoder.backbone.parameters() if p.requires_grad)
    assert size.trains_pieces == (spec == {})
    memory = estimate(size, 30, num_tokens=100, is_half=False, has_moments=True)
    if spec:  # nothing to compact
        assert (memory.weights, memory.num_trained) == (4 * size.num_parameters, size.num_trained)
    else:
        assert memory.num_trained == size.num_trained - (size.num_pieces - 30) * size.hidden
    assert memory.gradients + memory.optimizer == 12 * memory.num_trained
    whole = estimate(replace(size, num_frozen=0), 30, num_tokens=100, is_half=False, has_moments=True)
    assert memory.activations == whole.activations * (1 if "freeze" not in spec else 0.5)


def _save(folder: Path, tokenizer_of: Path, config: PreTrainedConfig) -> Path:
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        AlbertConfig(vocab_size=2000, embedding_size=8, hidden_size=64, intermediate_size=16, **TWO_LAYERS),
        T5Config(vocab_size=2000, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
        M2M100Config(vocab_size=2000, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_memory_counts_what_a_compact_vocabulary_trains(
    tmp_path: Path, tiny_encoder: Path, config: PreTrainedConfig
) -> None:
    """As sentence-transformers loads it: of a T5 the encoder alone."""
    encoder = _load(_save(tmp_path, tiny_encoder, config))
    size = backbone_size(EncoderSpec(str(tmp_path)))
    assert size.num_parameters == sum(p.numel() for p in encoder.backbone.parameters())
    encoder.compact_vocabulary(torch.arange(30))
    assert encoder.vocabulary is not None
    memory = estimate(size, len(encoder.vocabulary.weight), num_tokens=100, is_half=False, has_moments=True)
    assert memory.num_trained == sum(p.numel() for p in encoder.backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("count", [backbone_size, count_arithmetic])
def test_sizes_that_differ_by_layer_are_not_counted(tmp_path: Path, count: Any) -> None:
    """Gemma 4's local layers have narrower heads than its global ones: an estimate less, no more."""
    sizes = {"hidden_size": 16, "head_dim": 8, "intermediate_size": 16, "vocab_size": 50, **TWO_LAYERS}
    config = AutoConfig.for_model("gemma4_text", vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, **sizes)
    config.save_pretrained(tmp_path)
    with pytest.raises(UNCOUNTED, match="head_dim"):
        count(EncoderSpec(str(tmp_path)))


def test_adapter_dropout_is_its_own(tiny_encoder: Path) -> None:
    encoder = _load(tiny_encoder, lora=LoRA(dropout=0.3))
    rates = {name: m.p for name, m in encoder.named_modules() if isinstance(m, nn.Dropout)}
    assert {rate for name, rate in rates.items() if "lora" in name} == {0.3}
    assert {rate for name, rate in rates.items() if "lora" not in name} == {0.0}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
def test_layers_computed_again_give_the_same_gradient(tiny_encoders: dict[str, Path], kind: str) -> None:
    """With dropout, whose masks are replayed; each layer runs twice, and once without gradients."""
    spec = EncoderSpec(str(tiny_encoders[kind]), dropout=0.2)
    plain, again = (Encoder(replace(spec, checkpoint_layers=on), 4096).train() for on in (False, True))
    ran: list[int] = []
    for number, layer in enumerate(blocks(again.backbone)):
        next(layer.children()).register_forward_hook(lambda *_, number=number: ran.append(number))
    gradients = []
    for encoder in (plain, again):
        torch.manual_seed(4)
        gradients.append(_step(encoder))
    assert largest_difference(*gradients) < 1e-6
    num_layers = len(blocks(again.backbone))
    assert ran == [*range(num_layers), *reversed(range(num_layers))]
    ran.clear()
    with torch.no_grad():
        _embed(again)
    assert ran == [*range(num_layers)]


def test_layers_that_can_not_be_computed_again(tiny_encoders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_layers is true, .*'mpnet' again: set it to false, and lower"):
        _load(tiny_encoders["mpnet"], checkpoint_layers=True)
