"""Token ids against those that sentence-transformers makes of the same texts."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    WeightedLayerPooling,
    WordWeights,
)
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trainer.encoder import Encoder
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation, load_text_preparation, num_positions, position_offset

ODD_TEXTS = [
    "",
    "   ",
    "  leading, trailing and double  spaces \n and a newline\t",
    "UPPER case, Straße, İstanbul, ΟΔΥΣΣΕΥΣ, naïve café, ﬁne ½",
    "emoji 🙂👩‍👩‍👧, control \x00\u200b\ufeff, combining e\u0301",
    "[MASK] of <mask> and [SEP] or </s>",
    "word " * 400,
]


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0},
    **{"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


def _rows(path: Path, keys: tuple[str, ...], num: int) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(num), strict=False)]
    return [row[key] for row in rows for key in keys]


@pytest.fixture(scope="module")
def texts(data_dir: Path) -> list[str]:
    """English, Korean, Japanese, Hebrew and Amharic."""
    sources = [
        ("sts/stsb-en.dev.jsonl.gz", ("sentence1", "sentence2")),
        ("sts/korsts.dev.jsonl.gz", ("sentence1", "sentence2")),
        ("bitext/tanaka-ja-en.dev.jsonl.gz", ("ja", "en")),
        ("qa/heq-he.dev.jsonl.gz", ("question", "paragraph")),
        ("qa/amharic.dev.jsonl.gz", ("question", "paragraph")),
    ]
    return ODD_TEXTS + [text for path, keys in sources for text in _rows(data_dir / path, keys, 40)]


def _write(folder: Path, tokenizer: Path, model_type: str, **said: object) -> Path:
    """A sentence-transformers folder with a real tokenizer and hardly any weights."""
    shutil.copytree(tokenizer, folder)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(vocabulary) + 50,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=514 if model_type == "xlm-roberta" else 512,
        pad_token_id=1 if model_type == "xlm-roberta" else 0,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, **said}))
    return folder


@pytest.fixture(scope="module", params=["minilm", "mbert", "mbert-lower", "xlmr"])
def folder(
    request: pytest.FixtureRequest, data_dir: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "minilm":
        return minilm
    name, _, lower = request.param.partition("-")
    model_type = {"mbert": "bert", "xlmr": "xlm-roberta"}[name]
    target = tmp_path_factory.mktemp("text") / request.param
    return _write(target, data_dir / "tokenizers" / name, model_type, do_lower_case=bool(lower))


def _peer_ids(peer: SentenceTransformer, texts: list[str], prompt: str | None = None) -> list[list[int]]:
    features = peer.preprocess(texts, prompt=prompt)
    return [
        row[mask.bool()].tolist() for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]


def test_ids_are_those_of_sentence_transformers(folder: Path, texts: list[str]) -> None:
    """At the folder's length, at another, and behind a prompt."""
    peer = SentenceTransformer(str(folder), device="cpu")
    text = load_text_preparation(EncoderSpec(str(folder)))
    assert text.max_length == peer.max_seq_length == (256 if "minilm" in str(folder) else 128)
    assert text(texts) == _peer_ids(peer, texts)
    assert max(len(ids) for ids in text(texts)) == text.max_length
    prompted = replace(text, prompt="Query: ", max_length=20)
    peer.max_seq_length = 20
    assert prompted(texts) == _peer_ids(peer, texts, "Query: ")
    assert prompted.prompt_length == peer.preprocess(texts[:1], prompt="Query: ")["prompt_length"]
    assert text.prompt_length == 0


def test_lower_case_matters(data_dir: Path, tmp_path: Path) -> None:
    tokenizer = data_dir / "tokenizers" / "mbert"
    kept, lowered = (
        _prepare(_write(tmp_path / str(lower), tokenizer, "bert", do_lower_case=lower)) for lower in (False, True)
    )
    assert kept(["Der Arzt"]) != kept(["der arzt"]) == lowered(["Der Arzt"]) == lowered(["der arzt"])
    assert kept.fingerprint != lowered.fingerprint


def test_a_saved_folder_lowers_too(data_dir: Path, tmp_path: Path) -> None:
    """Though the class of its tokenizer makes a normalizer of its own when it is loaded."""
    folder = _write(tmp_path / "lowers", data_dir / "tokenizers" / "mbert", "bert", do_lower_case=True)
    encoder = Encoder(EncoderSpec(str(folder)), 4096)
    with encoder.as_sentence_transformer() as model:
        model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert _peer_ids(saved, ["Der ARZT"]) == _peer_ids(saved, ["der arzt"]) == encoder.text(["Der ARZT"])
    assert _prepare(tmp_path / "saved")(["Der ARZT"]) == encoder.text(["Der ARZT"])


def _prepare(folder: Path, **spec: object) -> TextPreparation:
    return load_text_preparation(EncoderSpec(str(folder), **spec))  # type: ignore[arg-type]


def test_a_prompt_that_leaves_no_text_is_refused(folder: Path) -> None:
    """Just where sentence-transformers gives different texts the same pieces."""
    peer = SentenceTransformer(str(folder), device="cpu")
    prompt, texts = "find what answers this: ", ["apples", "the rain", "12"]

    def fed(length: int) -> list[list[int]]:
        peer.max_seq_length = length
        return _peer_ids(peer, [prompt + text for text in texts])

    last = max(length for length in range(3, 16) if fed(length)[0] == fed(length)[1] == fed(length)[2])
    said = rf"max_length is {last}, 2 special ones included: no text is left; .*set max_length to {last + 1} or more$"
    with pytest.raises(ValueError, match=said):
        _prepare(folder, max_length=last, prompt=prompt)
    assert _prepare(folder, max_length=last + 1, prompt=prompt)(texts) == fed(last + 1)
    with pytest.raises(ValueError, match=r"no text is left; take a shorter prompt$"):
        _prepare(folder, prompt="word " * 600)


def test_fingerprint_follows_the_ids(tiny_encoders: dict[str, Path], demo_texts: list[str]) -> None:
    """The same for the same preparation, used or not, in this process or another; else another."""
    bert = tiny_encoders["bert"]
    used = _prepare(bert)
    used(demo_texts)
    used(demo_texts[:1])
    assert used.fingerprint == _prepare(bert).fingerprint == _prepare(bert, max_length=128).fingerprint
    copy = pickle.loads(pickle.dumps(_prepare(bert)))
    assert copy.fingerprint == used.fingerprint
    assert copy(demo_texts[:5]) == used(demo_texts[:5])
    others = [
        _prepare(bert, max_length=64),
        _prepare(bert, prompt="to "),
        _prepare(tiny_encoders["roberta"]),
        _prepare(tiny_encoders["mpnet"]),
    ]
    assert len({used.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_copy_of_the_folder_has_the_same_fingerprint(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "elsewhere")
    assert _prepare(tmp_path / "elsewhere").fingerprint == _prepare(tiny_encoder).fingerprint


def test_lengths_do_not_mix_in_threads(tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Columns of several lengths share one tokenizer, which holds the length; slices are built in the background."""
    text = replace(_prepare(tiny_encoder), max_lengths={"anchor": 5, "positive": 11})
    texts = [one * 3 for one in demo_texts[:50]]

    def longest(column: str) -> set[int]:
        return {max(map(len, text.of_column(column)(texts))) for _ in range(300)}

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(longest, ("anchor", "positive"))) == [{5}, {11}]


def test_a_tokenizer_in_python_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "slow")
    (tmp_path / "slow" / "tokenizer.json").unlink()
    (tmp_path / "slow" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (tmp_path / "slow" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has a tokenizer in Python \(BertJapaneseTokenizer\).*tokenizer\.json$"):
        _prepare(tmp_path / "slow")


def test_a_tokenizer_without_a_pad_piece_is_refused(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    """The folder that a run on it exports could not be used: sentence-transformers pads every batch."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders["qwen3"])
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    shutil.copytree(tiny_encoders["qwen3"], tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="does not have a padding token"):
        SentenceTransformer(str(tmp_path / "bare"), device="cpu").encode(["The doctor"])
    with pytest.raises(ValueError, match=r"bare' has a tokenizer without a pad piece.*: set tokenizer\.pad_token"):
        _prepare(tmp_path / "bare")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "bare")
    assert _prepare(tmp_path / "bare")(["The doctor"]) == _prepare(tiny_encoders["qwen3"])(["The doctor"])


def test_a_folder_of_another_kind_is_named(tiny_encoder: Path, tmp_path: Path) -> None:
    backend = json.loads((tiny_encoder / "tokenizer.json").read_text())
    static = StaticEmbedding(Tokenizer.from_str(json.dumps(backend)), embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path / "static"))
    with pytest.raises(ValueError, match=r"static' begins with a StaticEmbedding of .*begins with a Transformer$"):
        _prepare(tmp_path / "static")
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.ckpt").touch()
    with pytest.raises(ValueError, match=rf"is a checkpoint of a fit.*: make one with trainer export {checkpoint} OUT"):
        _prepare(checkpoint)
    (tmp_path / "run/model").mkdir()
    with pytest.raises(ValueError, match=rf"folder: name {tmp_path}/run/model, which its run has written, or make one"):
        _prepare(checkpoint)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^model\.encoder\.backbone '.*' can't be read by transformers: Unrecognized"):
        _prepare(tmp_path)


def test_a_folder_of_adapters_is_refused_and_the_remedy_helps(tiny_encoder: Path, tmp_path: Path) -> None:
    peer = SentenceTransformer(str(tiny_encoder), device="cpu")
    peer.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    peer.save_pretrained(str(tmp_path / "adapters"))
    with pytest.raises(ValueError, match=rf"adapters' holds adapters of peft .* for '{tiny_encoder}', .*: merge them"):
        _prepare(tmp_path / "adapters")
    base: Any = AutoModel.from_pretrained(tiny_encoder)
    merged: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "adapters").save_pretrained(tmp_path / "merged")
    _prepare(tmp_path / "merged")
    theirs = SentenceTransformer(str(tmp_path / "adapters"), device="cpu").encode(["The doctor"])
    ours = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(["The doctor"])
    assert abs(ours - theirs).max() < 1e-5
    assert abs(SentenceTransformer(str(tiny_encoder), device="cpu").encode(["The doctor"]) - theirs).max() > 1e-3


def _save(folder: Path, modules: list[Any], route: bool = False) -> Path:
    router = [Router({"query": modules, "document": modules[:1] + modules[-1:]})]
    SentenceTransformer(modules=router if route else modules, device="cpu").save_pretrained(str(folder))
    return folder


def test_modules_that_need_more_than_tokens_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """Before weights are read, in a route too; those that a stream gives all they need are not."""
    shell: Any = SentenceTransformer(str(tiny_encoder), device="cpu")
    transformer, words = shell[0], list(shell.tokenizer.get_vocab())
    refused: dict[str, Any] = {
        "CNN": [CNN(32, 32, kernel_sizes=[1, 3]), Pooling(64)],
        "LSTM": [LSTM(32, 16), Pooling(32)],
        "WeightedLayerPooling": [WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1), Pooling(32)],
        "WordWeights": [WordWeights(words, {"the": 0.1}), Pooling(32)],
    }
    for name, behind in refused.items():
        folder = _save(tmp_path / name, [transformer, *behind])
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=rf"'{folder}' has a {name} of .* as module 1 \(.*Pooling, Dense, LayerN"):
            _prepare(folder)
    routed = _save(tmp_path / "routed", [transformer, *refused["CNN"]], route=True)
    with pytest.raises(ValueError, match=r"has a CNN of sentence-transformers as module 1"):
        _prepare(routed, route="query")
    behind = [Pooling(32, ("cls", "max")), Dense(64, 16), LayerNorm(16), Dropout(0.2), Normalize()]
    assert _prepare(_save(tmp_path / "taken", [transformer, *behind]))(["a"]) == _prepare(tiny_encoder)(["a"])


@pytest.mark.parametrize(
    ("output", "gives"), [(["hidden_states", 1], "token_embeddings"), ("pooler_output", "sentence_embedding")]
)
def test_other_outputs_of_the_backbone_are_refused(
    tiny_encoder: Path, tmp_path: Path, output: object, gives: str
) -> None:
    said = {
        "modality_config": {"text": {"method": "forward", "method_output_name": output}},
        "module_output_name": gives,
    }
    folder = _with_settings(tiny_encoder, tmp_path / "other", **said)
    told = re.escape(json.dumps(["forward", output, gives]))
    with pytest.raises(ValueError, match=rf"'{folder}' gives texts {told} .*\[\"forward\", \"last_hidden_state\""):
        _prepare(folder)


def _with_settings(source: Path, folder: Path, name: str = "sentence_bert_config.json", **said: object) -> Path:
    """A copy of a folder that says more, or other things, of its texts."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").unlink()
    (folder / name).write_text(json.dumps(settings | said))
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sentence_roberta_config.json", {"max_seq_length": 12}),
        ("sentence_xlnet_config.json", {"max_seq_length": 12, "do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": 30, "processor_kwargs": {"model_max_length": 12}}),
        ("sentence_bert_config.json", {"tokenizer_args": {"model_max_length": 12, "truncation_side": "left"}}),
    ],
)
def test_all_settings_of_texts_are_read(
    tiny_encoder: Path, tmp_path: Path, demo_texts: list[str], name: str, said: dict[str, Any]
) -> None:
    folder = _with_settings(tiny_encoder, tmp_path / "folder", name, **said)
    peer, text, texts = SentenceTransformer(str(folder), device="cpu"), _prepare(folder), demo_texts[:9] + ODD_TEXTS
    assert text.max_length == peer.max_seq_length == 12
    assert text(texts) == _peer_ids(peer, texts)
    side = "left" if "tokenizer_args" in said else "right"
    assert text.tokenizer.truncation_side == side
    same_ids = side == "right" and "do_lower_case" not in said
    assert (text.fingerprint == _prepare(tiny_encoder, max_length=12).fingerprint) == same_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [("processing_kwargs", {"text": {"max_length": 12}}), ("query_length", 12), ("document_length", 12)],
)
def test_settings_of_calls_are_refused(tiny_encoder: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = _with_settings(tiny_encoder, tmp_path / "folder", **{name: value})
    with pytest.raises(ValueError, match=rf"have {name} \({re.escape(json.dumps(value))}\), which is not supported"):
        _prepare(folder)


def test_a_length_that_is_cut_is_told(
    tiny_encoders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _with_settings(tiny_encoders["qwen3"], tmp_path / "long", max_seq_length=32768)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config))
    assert SentenceTransformer(str(folder), device="cpu").max_seq_length == 32768
    assert _prepare(folder).max_length == 8192
    assert "takes 32,768 pieces, texts are cut at 8,192" in caplog.text
    caplog.clear()
    assert _prepare(folder, max_length=16384).max_length == 16384
    assert not caplog.text


@pytest.mark.parametrize(
    ("model_type", "settings", "offset", "positions"),
    [
        ("bert", {"max_position_embeddings": 512}, 0, 512),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 2, 512),
        ("xlm-roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 2, 512),
        ("mpnet", {"max_position_embeddings": 514, "pad_token_id": 1}, 2, 512),
        ("t5", {}, 0, None),
    ],
)
def test_positions(model_type: str, settings: dict[str, int], offset: int, positions: int | None) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    assert position_offset(config) == offset
    assert num_positions(config) == positions


@pytest.mark.parametrize(
    "model_type",
    [
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "roberta-prelayernorm",
        "xlm-roberta-xl",
        "xmod",
    ],
)
def test_as_many_positions_as_the_backbone_takes(model_type: str) -> None:
    """The longest text runs, and one of a piece more does not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"longformer": {"attention_window": [32]}, "xmod": {"languages": ["en_XX"], "default_language": "en_XX"}}
    more["luke"] = {"entity_vocab_size": 10, "entity_emb_size": 8}
    said: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 1, **sizes, **more.get(model_type, {})}
    config = AutoConfig.for_model(model_type, max_position_embeddings=34, **said)
    model, longest = AutoModel.from_config(config).eval(), num_positions(config)
    assert longest == 32
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7))


def test_relative_positions_have_no_end(tmp_path: Path, tiny_encoder: Path) -> None:
    """DeBERTa v3 adds none to the pieces. Where nothing is said, texts are cut where sentence-transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    for is_biased in (False, True):
        config = AutoConfig.for_model(
            "deberta-v2",
            **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"intermediate_size": 64, "max_position_embeddings": 64, "relative_attention": True},
            **{"pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "position_biased_input": is_biased},
        )
        AutoModel.from_config(config).save_pretrained(tmp_path / f"biased-{is_biased}")
        tokenizer.save_pretrained(tmp_path / f"biased-{is_biased}")
    peer = SentenceTransformer(str(tmp_path / "biased-False"), device="cpu")
    assert _prepare(tmp_path / "biased-False").max_length == peer.max_seq_length == 64
    peer.max_seq_length = 100
    assert peer.preprocess(["stone " * 300])["input_ids"].shape == (1, 100)
    assert peer.encode(["stone " * 300]).shape == (1, 32)
    assert _prepare(tmp_path / "biased-False", max_length=100).max_length == 100
    with pytest.raises(ValueError, match=r"max_length is 100, but .* has 64 positions"):
        _prepare(tmp_path / "biased-True", max_length=100)


@pytest.mark.parametrize(
    ("model_type", "settings", "length"),
    [
        ("big_bird", {"block_size": 4, "num_random_blocks": 1}, 28),
        ("qwen3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 16}}, 16),
    ],
)
def test_a_length_at_which_texts_of_a_batch_change_each_other(
    tmp_path: Path, tiny_encoder: Path, model_type: str, settings: dict[str, Any], length: int
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    AutoConfig.for_model(model_type, **sizes, **settings).save_pretrained(tmp_path / "model")
    assert _prepare(tmp_path / "model", max_length=length).max_length == length
    with pytest.raises(ValueError, match=rf"is {length + 1}, but a batch with .*; set max_length to {length} or less"):
        _prepare(tmp_path / "model", max_length=length + 1)


def test_no_weights_are_read(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "light")
    (tmp_path / "light" / "model.safetensors").unlink()
    assert _prepare(tmp_path / "light")(["The doctor"]) == _prepare(tiny_encoder)(["The doctor"])
