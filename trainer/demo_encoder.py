"""Small encoders with random weights and a tokenizer of their own, for the demo and the tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.files import share_weights

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

# Pad stands where the real tokenizers have it: RoBERTa and MPNet count positions from pad's id + 1.
SPECIAL_TOKENS = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "mpnet": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "[UNK]", "mask": "<mask>"},
    "qwen3": {"pad": "<|endoftext|>", "unk": "[UNK]"},  # one piece ends and pads a text
}
_DROPOUT = 0.1  # every rate that a kind knows
Kind = Literal["bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3", "deberta-v2"]


def write_encoder(
    folder: Path,
    texts: Iterable[str],
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 2000,
    seed: int = 0,
    max_positions: int = 128,
    kind: Kind = "bert",
    normalize: bool = False,
) -> Path:
    """Writes a sentence-transformers folder with random weights and a WordPiece of ``texts``.

    Args:
        vocab: most pieces the tokenizer may have; fewer when the texts hold fewer.
        max_positions: longest text in pieces, special tokens included.
        kind: type of the backbone; qwen3 pools the last piece, the others the mean.
        normalize: append a Normalize module.

    The same arguments give the same bytes; the global random state is left as it was.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig, AutoModel

    tokenizer = _train_tokenizer(texts, vocab, max_positions, kind)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_positions + (tokenizer.pad_token_id + 1 if kind in ("roberta", "mpnet") else 0),
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **_settings(kind, hidden, heads, tokenizer.pad_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(config)
    with tempfile.TemporaryDirectory() as plain_folder:
        backbone.save_pretrained(plain_folder)
        tokenizer.save_pretrained(plain_folder)
        pooling = Pooling(hidden, "lasttoken" if kind == "qwen3" else "mean")
        modules = [Transformer(plain_folder), pooling, *([Normalize()] if normalize else [])]
        model = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")
        model.save_pretrained(str(folder), create_model_card=False)
    share_weights(folder)
    return folder


def _settings(kind: Kind, hidden: int, heads: int, pad: int) -> dict[str, Any]:
    """What a kind's config calls by names of its own."""
    if kind == "distilbert":
        return {"hidden_dim": 4 * hidden, "dropout": _DROPOUT, "attention_dropout": _DROPOUT, "pad_token_id": pad}
    if kind == "modernbert":
        rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), _DROPOUT)
        # A window so small that sentences reach over it: a piece sees 8 to each side in every layer but each third.
        return {"intermediate_size": 2 * hidden, "local_attention": 16, "pad_token_id": pad, **rates}
    if kind == "qwen3":
        return {
            "intermediate_size": 3 * hidden,
            "num_key_value_heads": heads // 2,
            "head_dim": 2 * hidden // heads,  # as in the 0.6B model: heads are wider together than the stream
            "attention_dropout": _DROPOUT,
        }
    rates = {"hidden_dropout_prob": _DROPOUT, "attention_probs_dropout_prob": _DROPOUT}
    return {"intermediate_size": 4 * hidden, "pad_token_id": pad, **rates}


def _train_tokenizer(texts: Iterable[str], vocab: int, max_positions: int, kind: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS.get(kind, SPECIAL_TOKENS["bert"])
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = _train_pieces([normalizer.normalize_str(t) for t in texts], splitter, list(special.values()), vocab)
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=special["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    first, last = special.get("cls", ""), special.get("sep", special["pad"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(), special_tokens=[(token, pieces[token]) for token in (first, last) if token]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_positions,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
        **({"padding_side": "left"} if kind == "qwen3" else {}),
    )


def _train_pieces(texts: list[str], splitter: PreTokenizer, special: list[str], vocab: int) -> dict[str, int]:
    """Piece -> id of a WordPiece vocabulary.

    The trainer numbers the pieces inside words ("##a") in the order of a hash map, another one in every run,
    and breaks ties by these numbers. Handing them over as special tokens fixes the order; they are special
    only here.
    """
    from tokenizers import Tokenizer, models, trainers

    inner = [f"##{char}" for char in sorted(set("".join(texts))) if not char.isspace()]
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.pre_tokenizer = splitter
    wordpiece = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=special + inner, show_progress=False)
    tokenizer.train_from_iterator(texts, wordpiece)
    return tokenizer.get_vocab()
