"""The encoder against sentence-transformers' padded forward of the same folder, in value and in gradient."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BigBirdConfig,
    ConvBertConfig,
    FNetConfig,
    GPT2Config,
    MixtralConfig,
    MobileBertConfig,
    NomicBertConfig,
    OPTConfig,
    PreTrainedConfig,
    XLNetConfig,
    YosoConfig,
)

from tests.batches import build_batch, gradients_of, largest_difference, norm_of
from trainer.batch import PackedBatch
from trainer.data.collate import pack_texts
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.encoder import PACKED_MODEL_TYPES
from trainer.encoder.folder import normalizes
from trainer.encoder.text import load_text_preparation

WHOLE = 16384
TINY: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0},
}
TEXTS = [  # of very different lengths, one empty, one twice
    "The doctor bought the car at the shop in winter.",
    "In winter, at dusk, the physician purchased a vehicle.",
    "a",
    "",
    "It was the thief who stole that clock last week by the sea.",
    "The doctor bought the car at the shop in winter.",
    "stone " * 30,
    "At noon the lamp was painted by the stranger on the hill, and the picture was hidden in the cellar.",
]


def _load(folder: Path | str, max_tokens: int = WHOLE, **spec: object) -> Encoder:
    spec.setdefault("dropout", 0.0)
    return Encoder(EncoderSpec(backbone=str(folder), **spec), max_tokens)  # type: ignore[arg-type]


def _pack(encoder: Encoder, texts: list[str]) -> PackedBatch:
    return pack_texts(encoder.text(texts))


def _embed(encoder: Encoder, texts: list[str] = TEXTS) -> Tensor:
    with torch.no_grad():
        return encoder.embed(_pack(encoder, texts))


def _backward(embeddings: Tensor) -> None:
    """Of a function whose gradient differs at every element."""
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    (embeddings * weights).sum().backward()


def _peer(folder: Path | str) -> Any:
    return SentenceTransformer(str(folder), device="cpu").eval()


def _peer_embed(peer: Any, texts: list[str] = TEXTS, prompt: str | None = None) -> Tensor:
    return peer(peer.preprocess(texts, prompt=prompt))["sentence_embedding"]


def _peer_gradients(peer: Any) -> dict[str, Tensor]:
    return {f"backbone.{name}": grad for name, grad in gradients_of(peer[0].model).items()}


KINDS = ("bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3", "deberta-v2")


@pytest.fixture(params=[*KINDS, "minilm"])
def folder(request: pytest.FixtureRequest, tiny_encoders: dict[str, Path]) -> Path:
    return request.getfixturevalue("minilm") if request.param == "minilm" else tiny_encoders[request.param]


@pytest.mark.parametrize("max_tokens", [WHOLE, 60], ids=["whole", "chunked"])
def test_equals_the_padded_forward(folder: Path, max_tokens: int) -> None:
    """Embeddings and the gradients of all parameters: packed (BERT, RoBERTa with its position offset, ModernBERT with
    its windows, Qwen3 with grouped causal heads) or padded by us (DeBERTa), in one forward or in chunks under
    activation checkpointing."""
    peer, encoder = _peer(folder), _load(folder, max_tokens)
    encoder.train()  # dropout is 0
    assert encoder.packed == ("deberta" not in str(folder))
    assert (len(list(encoder._chunks(_pack(encoder, TEXTS).lengths))) > 2) == (max_tokens != WHOLE)
    ours, theirs = encoder.embed(_pack(encoder, TEXTS)), _peer_embed(peer)
    assert ours.dtype == torch.float32
    assert largest_difference({"": ours}, {"": theirs}) < 1e-5
    _backward(ours)
    _backward(theirs)
    our_gradients, their_gradients = gradients_of(encoder), _peer_gradients(peer)
    assert largest_difference(our_gradients, their_gradients) < 1e-5
    assert norm_of(our_gradients) / norm_of(their_gradients) == pytest.approx(1.0, abs=1e-5)
    for name, gradient in their_gradients.items():
        # A key bias has gradient 0: only its rounding error is there to compare.
        if gradient.abs().max() > 1e-3 * max(float(g.abs().max()) for g in their_gradients.values()):
            assert largest_difference({"": our_gradients[name]}, {"": gradient}) < 5e-5, name


@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
def test_a_decoder_that_looks_both_ways(tiny_encoders: dict[str, Path], tmp_path: Path, window: int | None) -> None:
    """Qwen3 whose config says so: its layers say that they are causal all the same."""
    shutil.copytree(tiny_encoders["qwen3"], tmp_path / "both")
    path = tmp_path / "both" / "config.json"
    config = json.loads(path.read_text()) | {"is_causal": False}
    if window is not None:
        config |= {"use_sliding_window": True, "sliding_window": window}
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    path.write_text(json.dumps(config))
    # At the first piece, which sees nothing of its text in a causal model.
    encoder = _load(tmp_path / "both", pooling="cls").eval()
    peer = _peer(tmp_path / "both")
    peer[1] = Pooling(32, "cls")
    assert encoder.packed
    ours, theirs = encoder.embed(_pack(encoder, TEXTS)), _peer_embed(peer)
    assert largest_difference({"": ours}, {"": theirs}) < 1e-5


def test_a_chat_template_is_left_aside(
    tiny_encoders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As training reads texts, so does the saved folder; one that asks for the template is refused."""
    shell = _peer(tiny_encoders["qwen3"])
    shell.tokenizer.chat_template = "{% for m in messages %}the doctor {{ m['content'] }} car{% endfor %}"
    shell[0].model.save_pretrained(tmp_path / "plain")
    shell.tokenizer.save_pretrained(tmp_path / "plain")
    assert "message" in _peer(tmp_path / "plain")[0].modality_config
    with caplog.at_level(logging.WARNING):
        encoder = _load(tmp_path / "plain").eval()
    assert "training and the exported folder read bare texts" in caplog.text
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "saved"))
    peer, texts = _peer(tmp_path / "saved"), [text for text in TEXTS if text]
    ids = [row[mask.bool()].tolist() for row, mask in zip(*_features(peer, texts), strict=True)]
    assert encoder.text(texts) == ids
    assert largest_difference({"": _embed(encoder, texts)}, {"": _peer_embed(peer, texts)}) < 1e-5
    _peer(tmp_path / "plain").save_pretrained(str(tmp_path / "asks"))
    with pytest.raises(ValueError, match=r"puts texts into a chat template \(message in modality_config .*delete"):
        _load(tmp_path / "asks")


def _features(peer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    features = peer.preprocess(texts)
    return features["input_ids"], features["attention_mask"]


def test_columns_of_the_rows_that_count(tiny_encoder: Path) -> None:
    encoder = _load(tiny_encoder).eval()
    ids = encoder.text(TEXTS)
    anchors, positives = encoder(build_batch([ids[:4], ids[4:]]))
    alone = torch.cat([encoder.embed(pack_texts([text])) for text in ids])
    assert_close(anchors, alone[:4], rtol=0.0, atol=2e-6)
    assert_close(positives, alone[4:], rtol=0.0, atol=2e-6)
    nothing = encoder(build_batch([ids[:1], ids[4:5]], world_size=2, rank=1))
    assert [column.shape for column in nothing] == [(0, 32)] * 2
    assert all(column.requires_grad for column in nothing)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_poolings(tiny_encoders: dict[str, Path], kind: str, pooling: str) -> None:
    encoder = _load(tiny_encoders[kind], pooling=pooling).eval()
    peer = _peer(tiny_encoders[kind])
    features = peer.preprocess(TEXTS)
    with torch.no_grad():
        tokens, mask = peer[0](features)["token_embeddings"], features["attention_mask"].bool()
    rows = [vectors[real] for vectors, real in zip(tokens, mask, strict=True)]
    pool = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.amax(0), "last": lambda x: x[-1]}
    expected = torch.stack([pool[pooling](row) for row in rows])
    assert_close(_embed(encoder), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompt(tiny_encoder: Path, tmp_path: Path, include_prompt: bool) -> None:
    """A prompt stands before every text; pooling leaves its pieces out where the folder says so."""
    peer = _peer(tiny_encoder)
    peer[1].include_prompt = include_prompt
    peer.prompts, peer.default_prompt_name = {"find": "At night: "}, "find"
    peer.save_pretrained(str(tmp_path / "prompted"))
    given, stored = _load(tmp_path / "prompted", prompt="last week "), _load(tmp_path / "prompted")
    none = _load(tmp_path / "prompted", prompt="")
    for encoder, prompt in ((given, "last week "), (stored, "At night: "), (none, None)):
        expected = _peer_embed(peer, prompt=prompt).detach()
        assert_close(_embed(encoder.eval()), expected, rtol=0.0, atol=1e-5)
    assert float((_embed(given) - _embed(none)).abs().max()) > 1e-2


def test_overrides_are_said(tiny_encoder: Path, minilm: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trainer"):
        plain = _load(tiny_encoder)
        assert caplog.messages == []
        added = _load(tiny_encoder, pooling="cls", normalize=True)
        removed = _load(minilm, normalize=False)
        _load(minilm, normalize=True, pooling="mean")
    assert caplog.messages == [
        "pooling: the folder says mean, the config overrides it with cls",
        "normalize: the folder does not, the config adds it",
        "normalize: the folder does, the config removes it",
    ]
    assert float((_embed(plain.eval()).norm(dim=1) - 1.0).abs().min()) > 1e-3
    assert_close(_embed(added.eval()).norm(dim=1), torch.ones(len(TEXTS)))
    unnormalized = _embed(removed.eval())
    expected = _peer_embed(_peer(minilm)).detach()
    assert_close(nn.functional.normalize(unnormalized, dim=1), expected, rtol=0.0, atol=1e-5)
    assert float((unnormalized.norm(dim=1) - 1.0).abs().min()) > 1e-3


def test_a_normalize_before_a_dense_gives_no_length_of_1(tiny_encoder: Path, tmp_path: Path) -> None:
    plain = SentenceTransformer(str(tiny_encoder), device="cpu")
    modules: list[Any] = [*plain, Normalize(), Dense(32, 12)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "inside"))
    inside = str(tmp_path / "inside")
    expected = _peer_embed(_peer(inside)).detach()
    assert float((expected.norm(dim=1) - 1.0).abs().min()) > 1e-3
    for normalize in ("auto", False):
        assert_close(_embed(_load(inside, normalize=normalize).eval()), expected, rtol=0.0, atol=1e-5)
    added = _embed(_load(inside, normalize=True).eval())
    assert_close(added, nn.functional.normalize(expected, dim=1), rtol=0.0, atol=1e-5)
    assert [normalizes(EncoderSpec(inside, normalize=one)) for one in ("auto", True)] == [False, True]


@pytest.mark.parametrize("behind", [Dense(64, 12), LayerNorm(64)], ids=["Dense", "LayerNorm"])
def test_a_pooling_that_no_longer_fits_is_refused(tiny_encoder: Path, tmp_path: Path, behind: Any) -> None:
    """With a layer of another width behind it; one of the same width is taken, and any where no layer has one."""
    backbone, (wide, narrow) = _peer(tiny_encoder)[0], (Pooling(32, ("mean", "max")), Pooling(32, "mean"))
    for name, modules in (("wide", [wide, behind]), ("free", [wide, Normalize()]), ("narrow", [narrow, Dense(32, 32)])):
        SentenceTransformer(modules=[backbone, *modules], device="cpu").save_pretrained(str(tmp_path / name))
    told = (
        rf"gives 32 numbers, but the {type(behind).__name__} behind .* takes 64 \(mean and max\): set pooling to auto"
    )
    with pytest.raises(ValueError, match=rf"^model\.encoder\.pooling is cls, which {told}$"):
        _load(tmp_path / "wide", pooling="cls")
    for name in ("free", "narrow"):
        assert _embed(_load(tmp_path / name, pooling="cls").eval()).shape == (len(TEXTS), 32)


def test_pieces_beyond_the_embedding(tiny_encoder: Path, tmp_path: Path) -> None:
    """As in sentence-transformers: no text but one that holds such a piece is any worse for it."""
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny_encoder, tmp_path / "model"))
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    encoder, peer = _load(tmp_path / "model"), _peer(tmp_path / "model")
    encoder.compact_vocabulary(torch.tensor([5, 6]))
    assert_close(_embed(encoder.eval()), _peer_embed(peer).detach(), rtol=0.0, atol=1e-5)
    assert encoder.text.fingerprint != load_text_preparation(EncoderSpec(str(tiny_encoder))).fingerprint
    with pytest.raises(IndexError):
        peer.encode(["a <new> text"])
    told = (
        rf"'<new>', piece {rows:,} \(from 0\) of .*model', but the embedding has {rows:,} rows: call resize_token_emb"
    )
    with pytest.raises(ValueError, match=f"^a text holds {told}"):
        encoder.text(["a text", "a <new> text"])
    tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(IndexError):
        _peer(tmp_path / "model").encode(["a text", "a text of another length"])
    with pytest.raises(ValueError, match=f"^texts are padded with {told}"):
        _load(tmp_path / "model")


def test_padded_backbones_say_so_once(tiny_encoders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trainer"):
        encoder = _load(tiny_encoders["deberta-v2"])
        _embed(encoder)
    assert caplog.messages == [
        f"backbone type 'deberta-v2' runs padded; packed forward: {', '.join(sorted(PACKED_MODEL_TYPES))}"
    ]


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_a_config_that_asks_for_a_tuple(tiny_encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = shutil.copytree(tiny_encoders[kind], tmp_path / kind) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    ours, theirs = _embed(_load(tmp_path / kind).eval()), _peer_embed(_peer(tmp_path / kind)).detach()
    assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_padding_on_the_left_moves_no_text(
    tiny_encoders: dict[str, Path], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would where positions are looked up in a table from the first place on."""
    backbone = {"gpt2": "bert"}.get(kind, kind)
    folder = shutil.copytree(tiny_encoders[backbone], tmp_path / kind)
    if kind == "gpt2":
        AutoModel.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400)).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    with caplog.at_level(logging.WARNING, logger="trainer"):
        encoder = _load(folder).eval()
    peer = _peer(folder)
    assert peer.tokenizer.padding_side == "left"
    alone = torch.cat([_peer_embed(peer, [text]) for text in TEXTS]).detach()
    moves = float((_peer_embed(peer) - alone).abs().max()) > 1e-3
    assert moves == (f"padding_side: the tokenizer of '{folder}' pads on the left" in caplog.text)
    assert moves == (kind in ("bert", "distilbert", "deberta-v2", "gpt2"))
    assert_close(_embed(encoder), alone, rtol=0.0, atol=1e-5)
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "saved"))
    saved = _peer(tmp_path / "saved")
    assert saved.tokenizer.padding_side == ("right" if moves else "left")
    assert_close(_peer_embed(saved).detach(), alone, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [WHOLE, 60], ids=["whole", "chunked"])
@pytest.mark.parametrize(
    "kind",
    [
        ConvBertConfig(head_ratio=2, conv_kernel_size=3, embedding_size=16, **TINY),
        FNetConfig(**TINY),
        MobileBertConfig(true_hidden_size=32, intra_bottleneck_size=32, embedding_size=16, **TINY),
        YosoConfig(**TINY),
    ],
    ids=lambda config: config.model_type,
)
def test_padding_never_reaches_a_text(
    tiny_encoder: Path, tmp_path: Path, kind: Any, max_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """These have no mask in all of their layers: sentence-transformers' embeddings depend on the batch."""
    torch.manual_seed(0)
    backbone = AutoModel.from_config(kind)
    with torch.no_grad():
        backbone.get_input_embeddings().weight.normal_()  # that of the pad piece too
    backbone.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        encoder = _load(tmp_path, max_tokens, max_length=64).eval()
    assert f"padding would change the embeddings of a '{kind.model_type}'" in caplog.text
    peer = _peer(tmp_path)
    peer.max_seq_length = 64
    alone = torch.cat([_peer_embed(peer, [text]) for text in TEXTS]).detach()
    assert float((_peer_embed(peer) - alone).abs().max()) > 1e-3
    assert_close(_embed(encoder), alone, rtol=0.0, atol=1e-5)


CODE = """
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertSelfAttention


class NearAttention(BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        layers = (self.query, self.key, self.value)
        query, key, value = (f(hidden_states).unflatten(-1, (self.num_attention_heads, -1)) for f in layers)
        scores = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)) * self.scaling
        places = hidden_states.new_ones(hidden_states.shape[1]).cumsum(0)
        scores = scores - 5 * (places[:, None] - places).abs()
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -1e9)
        return (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2), None


class NearBert(BertModel):
    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer)
        for layer in self.encoder.layer:
            layer.attention.self = NearAttention(config)
"""


def test_code_of_its_own_runs_padded(tiny_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a packed type by its config, but its attention knows of one text a row."""
    shutil.copytree(tiny_encoder, tmp_path / "own")
    (tmp_path / "own" / "modeling_near.py").write_text(CODE)
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling_near.NearBert"}}))
    peer = SentenceTransformer(str(tmp_path / "own"), device="cpu", trust_remote_code=True).eval()
    with caplog.at_level(logging.WARNING, logger="trainer"):
        encoder = _load(tmp_path / "own", trust_remote_code=True).eval()
    assert any("type 'bert' with Python code of its own (NearBert) runs padded; packed" in m for m in caplog.messages)
    theirs = _peer_embed(peer).detach()
    assert_close(_embed(encoder), theirs, rtol=0.0, atol=1e-5)
    assert float((theirs - _peer_embed(_peer(tiny_encoder)).detach()).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400, n_positions=128), 0),
        (XLNetConfig(d_model=32, d_inner=64, n_layer=2, n_head=4, vocab_size=400), 2),
        (BertConfig(**TINY), 1),
        (NomicBertConfig(**TINY), 1),
    ],
    ids=["gpt2", "xlnet", "bert", "nomic"],
)
def test_kinds_of_pieces_as_the_tokenizer_gives_them(
    tiny_encoder: Path, tmp_path: Path, kind: PreTrainedConfig, last: int
) -> None:
    """GPT-2 adds the row of the kind to each piece, also in training with a compact table; XLNet's last piece is of a
    kind of its own, and so may that of a backbone that runs packed."""
    torch.manual_seed(0)
    backbone = AutoModel.from_config(kind)
    for name, parameter in backbone.named_parameters():
        if "seg_embed" in name or "r_s_bias" in name:
            nn.init.normal_(parameter)
    backbone.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A [SEP] [CLS]:{last}",
        special_tokens=[(one, tokenizer.get_vocab()[one]) for one in ("[SEP]", "[CLS]")],
    )
    tokenizer.save_pretrained(tmp_path)

    def save(names: list[str]) -> None:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))

    save(["input_ids", "attention_mask"])
    without = _peer_embed(_peer(tmp_path)).detach()
    save(["input_ids", "token_type_ids", "attention_mask"])
    encoder, peer = _load(tmp_path, max_length=64), _peer(tmp_path)
    encoder.compact_vocabulary(torch.unique(_pack(encoder, TEXTS).input_ids_T))
    assert_close(_embed(encoder.eval()), _peer_embed(peer).detach(), rtol=0.0, atol=1e-5)
    assert float((_embed(encoder) - without).abs().max()) > 1e-3
    encoder.train().embed(_pack(encoder, TEXTS)).sin().sum().backward()
    _peer_embed(peer).sin().sum().backward()
    vocabulary = encoder.vocabulary
    assert vocabulary is not None
    assert vocabulary.weight.grad is not None
    full = peer[0].model.get_input_embeddings().weight.grad
    assert_close(vocabulary.weight.grad, full[vocabulary.used_ids], rtol=1e-4, atol=1e-5)


def test_a_plain_transformers_folder_is_pooled_by_mean(tiny_encoder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_encoder, plain)
    shutil.rmtree(plain / "1_Pooling")
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (plain / name).unlink()
    encoder = _load(plain).eval()
    assert_close(_embed(encoder), _embed(_load(tiny_encoder).eval()), rtol=0.0, atol=1e-6)
    assert encoder.text.max_length == 128


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_a_pad_piece_in_a_text(tiny_encoders: dict[str, Path], kind: str) -> None:
    """RoBERTa counts positions without it."""
    encoder, peer = _load(tiny_encoders[kind]).eval(), _peer(tiny_encoders[kind])
    pad = encoder.text.tokenizer.pad_token
    texts = [f"The doctor {pad} bought the car", "a", f"In winter {pad}{pad} the shop", f"{pad} a", "At noon the lamp"]
    assert [ids.count(encoder.text.tokenizer.pad_token_id) for ids in encoder.text(texts)] == [1, 0, 2, 1, 0]
    assert_close(_embed(encoder, texts), _peer_embed(peer, texts).detach(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("kind", "positions"), [(kind, 128) for kind in KINDS])
def test_the_longest_text_and_one_piece_more(tiny_encoders: dict[str, Path], kind: str, positions: int) -> None:
    """RoBERTa's and MPNet's position tables have two entries more, which no text may use."""
    long_text = ["stone " * 300]
    encoder = _load(tiny_encoders[kind], max_length=positions).eval()
    assert [len(ids) for ids in encoder.text(long_text)] == [positions]
    peer = _peer(tiny_encoders[kind])
    peer.max_seq_length = positions
    assert_close(_embed(encoder, long_text), _peer_embed(peer, long_text).detach(), rtol=0.0, atol=1e-5)
    message = rf"model.encoder.max_length is 129, but '.*{kind}' has 128 positions; set max_length to 128 or less"
    with pytest.raises(ValueError, match=message):
        _load(tiny_encoders[kind], max_length=129)
    shortest = encoder.text.shortest
    with pytest.raises(ValueError, match=f"but {shortest} pieces of every text are special; set max_length to "):
        _load(tiny_encoders[kind], max_length=shortest)
    encoder = _load(tiny_encoders[kind], max_length=shortest + 1)
    assert [len(ids) for ids in encoder.text(long_text)] == [shortest + 1]


def test_a_backbone_that_is_nowhere() -> None:
    with pytest.raises(ValueError, match="backbone 'no/such-model' is neither a model folder nor a reachable"):
        _load("no/such-model")


# -- dropout ------------------------------------------------------------------------------------------


def _keep_only_attention_dropout(encoder: Encoder) -> int:
    """Switch every other dropout off; returns how many are left."""
    kept = 0
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Dropout):
            # MPNet's attention module holds its own and, one level up, that of the layer's output.
            distilbert = name.startswith("backbone.transformer.") and name.endswith("attention.dropout")
            attention = distilbert or name.endswith(("self.dropout", "attn.dropout"))
            module.p = 0.5 if attention else 0.0
            kept += attention
        elif hasattr(module, "attention_dropout"):  # ModernBERT's and Qwen3's rate is a number
            module.attention_dropout = 0.5
            kept += 1
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1] * 4], ids=["ragged", "equal"])
def test_attention_dropout_is_on_in_training_only(tiny_encoders: dict[str, Path], kind: str, texts: list[str]) -> None:
    encoder = _load(tiny_encoders[kind])
    assert _keep_only_attention_dropout(encoder) == 2
    encoder.train()
    torch.manual_seed(0)
    one, other = _embed(encoder, texts), _embed(encoder, texts)
    spread = ((one - other).norm(dim=1) / one.norm(dim=1)).tolist()
    assert min(spread) > 1e-4, "a text without attention dropout"
    encoder.eval()
    assert torch.equal(_embed(encoder, texts), _embed(encoder, texts))
    encoder.set_dropout(0.0)
    assert torch.equal(_embed(encoder.train(), texts), _embed(encoder.eval(), texts))


def test_dropout_of_the_folder_is_kept_unless_set(tiny_encoder: Path) -> None:
    rates = {
        rate: {m.p for m in _load(tiny_encoder, dropout=rate).modules() if isinstance(m, nn.Dropout)}
        for rate in (None, 0.0, 0.3)
    }
    assert rates == {None: {0.1}, 0.0: {0.0}, 0.3: {0.3}}


@pytest.mark.parametrize(
    "kind",
    [
        OPTConfig(layerdrop=0.5, ffn_dim=64, word_embed_proj_dim=32, **TINY),
        MixtralConfig(router_jitter_noise=0.3, num_key_value_heads=4, num_local_experts=4, **TINY),
    ],
    ids=lambda config: config.model_type,
)
def test_dropout_of_0_ends_all_other_noise(tiny_encoder: Path, tmp_path: Path, kind: Any) -> None:
    """Dropped layers, and what is multiplied to the input of a router; another rate leaves them as they are."""
    AutoModel.from_config(kind).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    encoder = _load(tmp_path, dropout=1e-9, max_length=64).train()  # too rare to be met
    torch.manual_seed(0)
    draws = [_embed(encoder) for _ in range(8)]
    assert not all(torch.equal(draws[0], one) for one in draws)
    encoder.set_dropout(0.0)
    assert torch.equal(_embed(encoder), _embed(encoder.eval()))


def test_a_rate_that_the_folder_writes_as_an_integer(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_encoders["qwen3"], tmp_path / "qwen3")
    path = tmp_path / "qwen3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0}))
    encoder = _load(tmp_path / "qwen3", dropout=0.3).train()
    assert not torch.equal(_embed(encoder), _embed(encoder))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_stays_as_it_was_set_when_bigbird_changes_its_attention(
    tiny_encoder: Path, tmp_path: Path, dropout: float
) -> None:
    """transformers makes new modules for texts too short for blocks. The folder's own rate is exported all the same."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(BigBirdConfig(vocab_size=2000, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    encoder = _load(tmp_path, dropout=dropout).train()
    before = {type(module) for module in encoder.modules()}
    _embed(encoder)
    assert {type(module).__name__ for module in encoder.modules()} - {kind.__name__ for kind in before}
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {dropout}
    assert not dropout or not torch.equal(_embed(encoder), _embed(encoder))
    with encoder.as_sentence_transformer() as model:
        assert model[0].model.config.attention_probs_dropout_prob == 0.1


def test_chunks_replay_their_dropout(tiny_encoder: Path) -> None:
    """Masks follow the chunks, so chunked and whole differ in their draw; but the gradient of the chunked forward
    is that of the same forwards without checkpointing, one after the other from the same seed."""
    chunked, plain = _load(tiny_encoder, 60, dropout=0.3).train(), _load(tiny_encoder, dropout=0.3).train()
    batch = _pack(chunked, TEXTS)
    ids = [part.tolist() for part in batch.input_ids_T.split(list(batch.lengths))]
    chunks = [ids[segments] for segments, _ in chunked._chunks(batch.lengths)]
    assert len(chunks) > 2
    torch.manual_seed(5)
    ours = chunked.embed(batch)
    torch.manual_seed(5)
    theirs = torch.cat([plain.embed(pack_texts(chunk)) for chunk in chunks])[batch.order_S]
    assert torch.equal(ours, theirs)
    _backward(ours)
    _backward(theirs)
    assert largest_difference(gradients_of(chunked), gradients_of(plain)) < 1e-6


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_chunks_keep_to_the_budget(tiny_encoders: dict[str, Path], kind: str) -> None:
    """Tokens of a packed chunk, or slots of a padded one; a text over the budget runs alone."""
    encoder = _load(tiny_encoders[kind], max_tokens=20)
    lengths: tuple[int, ...] = (1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 11, 19, 20, 21, 90)
    chunks = list(encoder._chunks(lengths))
    assert [i for segments, _ in chunks for i in range(segments.start, segments.stop)] == list(range(len(lengths)))
    for segments, tokens in chunks:
        inside = lengths[segments]
        assert tokens.stop - tokens.start == sum(inside)
        assert tokens.start == sum(lengths[: segments.start])
        cost = sum(inside) if encoder.packed else len(inside) * max(inside)
        assert cost <= 20 or len(inside) == 1
    # The first may hold what is left over; before every other one stands a text that it has no room for.
    for segments, _ in chunks[1:]:
        inside = lengths[segments.start - 1 : segments.stop]
        assert (sum(inside) if encoder.packed else len(inside) * max(inside)) > 20


def test_the_last_chunk_is_embedded_once(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all others twice; without gradients once."""
    encoder = _load(tiny_encoder, 60, dropout=0.3).train()
    forwards: list[int] = []
    embed_stream = encoder._embed_stream

    def counted(input_ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        forwards.append(len(input_ids_T))
        return embed_stream(input_ids_T, *rest)

    monkeypatch.setattr(encoder, "_embed_stream", counted)
    batch = _pack(encoder, TEXTS)
    sizes = [tokens.stop - tokens.start for _, tokens in encoder._chunks(batch.lengths)]
    assert len(sizes) > 2
    embeddings = encoder.embed(batch)
    assert forwards == sizes
    _backward(embeddings)
    assert forwards[len(sizes) :] == sizes[-2::-1], "backward goes from the last chunk to the first"
    forwards.clear()
    with torch.no_grad():
        encoder.embed(batch)
    assert forwards == sizes


# -- the way out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_as_sentence_transformer_is_the_same_model(tiny_encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Inside the block and after a save and a load; behind it training goes on as before."""
    encoder = _load(tiny_encoders[kind], dropout=None).train()
    encoder.compact_vocabulary(torch.unique(torch.cat([torch.tensor(ids) for ids in encoder.text(TEXTS[:3])])))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    vocabulary = encoder.vocabulary
    with encoder.as_sentence_transformer() as model:
        inside = model.encode(TEXTS, convert_to_tensor=True)
        model.save_pretrained(str(tmp_path / "saved"))
    assert encoder.vocabulary is vocabulary
    assert all(module.training for module in encoder.modules())
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    ours = _embed(encoder.eval())
    assert_close(inside, ours, rtol=0.0, atol=1e-5)
    assert_close(loaded, ours, rtol=0.0, atol=1e-5)
