"""Each type of backbone that runs packed against sentence-transformers' padded run of the same folder. Those of which
the demo makes encoders have the tests beside this file; these are made here, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoTokenizer,
    CamembertConfig,
    Data2VecTextConfig,
    ElectraConfig,
    ErnieConfig,
    EuroBertConfig,
    Gemma3TextConfig,
    GteConfig,
    JinaEmbeddingsV3Config,
    LlamaConfig,
    MistralConfig,
    NomicBertConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaPreLayerNormConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

from tests.batches import gradients_of, largest_difference
from trainer.data.collate import pack_texts
from trainer.demo_encoder import Kind
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.encoder import PACKED_MODEL_TYPES
from trainer.encoder.size import backbone_size, meta_backbone

HIDDEN, FEED_FORWARD, LAYERS, LONGEST = 32, 48, 2, 140  # pieces: more than attention on a CPU has in one function
SIZES: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    **{"intermediate_size": FEED_FORWARD, "max_position_embeddings": LONGEST, "bos_token_id": None},
    "eos_token_id": None,
}
# No dropout but that of attention.
BERT: dict[str, Any] = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5, "pad_token_id": 0}
ROBERTA = BERT | {"pad_token_id": 1, "max_position_embeddings": LONGEST + 2}
# Two heads of queries to one of keys, all together wider than the stream.
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "attention_dropout": 0.5, "pad_token_id": 0}
WINDOW, BOTH_WAYS = {"sliding_window": 9}, {"is_causal": False}
QWEN2 = LLAMA | {"use_sliding_window": True, "max_window_layers": 1} | WINDOW
GEMMA = LLAMA | {"query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"]} | WINDOW
NEAR = {"rope_type": "default", "rope_theta": 100.0}
STRETCHED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}
STRETCHED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, PreTrainedConfig] = {
    "albert": AlbertConfig(embedding_size=24, **BERT),
    "camembert": CamembertConfig(**ROBERTA),
    "data2vec": Data2VecTextConfig(**ROBERTA),
    "electra": ElectraConfig(embedding_size=24, **BERT),
    "ernie": ErnieConfig(use_task_id=True, **BERT),
    "eurobert": EuroBertConfig(mask_token_id=4, rope_parameters=NEAR, **LLAMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "gemma3-both-ways": Gemma3TextConfig(**GEMMA | {"use_bidirectional_attention": True}),
    "gemma3-both-ways-by-config": Gemma3TextConfig(**GEMMA | BOTH_WAYS),
    "gemma3-both-ways-twice": Gemma3TextConfig(**GEMMA | BOTH_WAYS | {"use_bidirectional_attention": True}),
    "gte": GteConfig(rope_parameters=NEAR, **BERT),
    "jina": JinaEmbeddingsV3Config(rope_parameters=NEAR, **ROBERTA),
    "llama": LlamaConfig(attention_bias=True, mlp_bias=True, rope_parameters=STRETCHED, **LLAMA),
    "llama-both-ways": LlamaConfig(**LLAMA | BOTH_WAYS),
    "mistral": MistralConfig(**LLAMA | {"sliding_window": None}),
    "mistral-window": MistralConfig(**LLAMA | WINDOW),
    "mistral-window-both-ways": MistralConfig(**LLAMA | WINDOW | BOTH_WAYS),
    "nomic": NomicBertConfig(rope_parameters=NEAR, **BERT),
    "qwen2": Qwen2Config(**QWEN2 | {"use_sliding_window": False}),
    "qwen2-window": Qwen2Config(**QWEN2),
    "qwen2-window-both-ways": Qwen2Config(**QWEN2 | BOTH_WAYS),
    "roberta-prelayernorm": RobertaPreLayerNormConfig(**ROBERTA),
    "xlm-roberta": XLMRobertaConfig(**ROBERTA),
    "xlm-roberta-xl": XLMRobertaXLConfig(**ROBERTA),
}
TEXTS = [  # some of them shorter than a window, and than the 128 pieces of one function
    "The doctor bought the car at the shop in winter.",
    "a",
    "It was the thief who stole that clock last week by the sea.",
    "The doctor bought the car at the shop in winter.",
    "At noon the lamp was painted by the stranger on the hill, and the picture was hidden in the cellar.",
    "In winter, at dusk, the physician purchased a vehicle. " * 20,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: dict[str, Path]) -> dict[str, Path]:
    """Plain folders of transformers, pooled by the mean. Decoders pad on the left."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, config in CASES.items():
        torch.manual_seed(0)
        backbone = AutoModel.from_config(config)
        with torch.no_grad():
            for weight in backbone.parameters():  # large enough that it matters who sees whom
                weight.add_(torch.randn(weight.shape), alpha=0.2 if weight.ndim > 1 else 0.1)
        backbone.save_pretrained(folder / name)
        like = "roberta" if config.pad_token_id == 1 else "qwen3" if hasattr(config, "rms_norm_eps") else "bert"
        AutoTokenizer.from_pretrained(tiny_encoders[like]).save_pretrained(folder / name)
    return {name: folder / name for name in CASES}


def _load(folder: Path, max_tokens: int = 4096, **spec: Any) -> Encoder:
    return Encoder(EncoderSpec(str(folder), max_length=LONGEST, **spec), max_tokens)


def _peer(folder: Path) -> Any:
    peer = SentenceTransformer(str(folder), device="cpu").eval()
    peer.max_seq_length = LONGEST
    return peer


def _backward(embeddings: Tensor) -> None:
    """Of a function whose gradient differs at every element."""
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    (embeddings * weights).sum().backward()


def test_every_packed_type_has_its_proof() -> None:
    assert {config.model_type for config in CASES.values()} | set(get_args(Kind)) >= PACKED_MODEL_TYPES


@pytest.mark.parametrize("name", CASES)
def test_packed_is_padded(folders: dict[str, Path], name: str) -> None:
    """Embeddings, and the gradients of all weights, those of the embedding matrix in a compact one: of long texts and
    short, of short ones alone, in chunks under activation checkpointing, and of one text."""
    peer, encoder = _peer(folders[name]), _load(folders[name], dropout=0.0).train()
    assert encoder.packed
    everything = pack_texts(encoder.text(TEXTS))
    assert [length > 128 for length in everything.lengths] == [False] * 5 + [True]
    encoder.compact_vocabulary(torch.unique(everything.input_ids_T))
    vocabulary, full = encoder.vocabulary, peer[0].model.get_input_embeddings().weight
    assert vocabulary is not None
    embedding = next(name for name, weight in peer[0].model.named_parameters() if weight is full)
    for texts, encoder.max_tokens in ((TEXTS, 4096), (TEXTS[:5], 4096), (TEXTS, 100), (TEXTS[5:], 4096)):
        batch = pack_texts(encoder.text(texts))
        assert (len(list(encoder._chunks(batch.lengths))) > 1) == (encoder.max_tokens == 100)
        ours, theirs = encoder.embed(batch), peer(peer.preprocess(texts))["sentence_embedding"]
        assert largest_difference({"": ours.detach()}, {"": theirs.detach()}) < 1e-5
        _backward(ours)
        _backward(theirs)
        their_gradients = gradients_of(peer[0].model)
        their_gradients[embedding] = their_gradients[embedding][vocabulary.used_ids]
        assert largest_difference(gradients_of(encoder.backbone), their_gradients) < 1e-5
        for model in (encoder, peer):
            model.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_attention_dropout_is_on_in_training_only(folders: dict[str, Path], name: str) -> None:
    encoder = _load(folders[name])
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} <= {0.0, 0.5}
    for texts in (TEXTS[2:5], TEXTS[4:]):
        batch = pack_texts(encoder.text(texts))
        torch.manual_seed(0)
        with torch.no_grad():
            one, other = (encoder.train().embed(batch) for _ in range(2))
            spread = ((one - other).norm(dim=1) / one.norm(dim=1)).tolist()
            assert min(spread) > 1e-3, "a text without attention dropout"
            assert torch.equal(encoder.eval().embed(batch), encoder.embed(batch))


@pytest.mark.parametrize("name", ["albert", "electra", "gemma3-both-ways"])
def test_the_saved_folder_is_the_same_model(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Where the embeddings are widened or scaled behind the table, or the config halves the window that it reads."""
    encoder = _load(folders[name], dropout=0.0).eval()
    batch = pack_texts(encoder.text(TEXTS))
    encoder.compact_vocabulary(torch.unique(batch.input_ids_T))
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.01)
        ours = encoder.embed(batch)
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path), create_model_card=False)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert largest_difference({"": ours}, {"": theirs}) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_feed_forward_layers_of_two_branches(folders: dict[str, Path], name: str) -> None:
    """They have three matrices, and others two."""
    spec = EncoderSpec(str(folders[name]))
    linear = [module for module in meta_backbone(spec).modules() if isinstance(module, nn.Linear)]
    num = sum(module.weight.numel() == HIDDEN * FEED_FORWARD for module in linear)
    num_layers = 1 if name == "albert" else LAYERS  # its layers share their weights
    assert num == num_layers * (3 if backbone_size(spec).is_gated else 2)
