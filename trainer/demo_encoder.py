"""Small encoders with random weights and a tokenizer of their own, for the demo and the tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

# Pad stands where the real tokenizers have it: RoBERTa and MPNet count positions from pad's id + 1.
SPECIAL_TOKENS = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "mpnet": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "[UNK]", "mask": "<mask>"},
}


def write_encoder(
    folder: Path,
    texts: Iterable[str],
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 2000,
    dropout: float = 0.1,
    seed: int = 0,
    max_positions: int = 128,
    kind: Literal["bert", "roberta", "mpnet"] = "bert",
    normalize: bool = False,
) -> Path:
    """Writes a sentence-transformers folder with random weights, mean pooling and a WordPiece of ``texts``.

    Args:
        vocab: most pieces the tokenizer may have; fewer when the texts hold fewer.
        max_positions: longest text in pieces, special tokens included.
        normalize: append a Normalize module.

    The same arguments give the same bytes; the global random state is left as it was.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig, AutoModel

    tokenizer = _train_tokenizer(texts, vocab, max_positions, kind)
    first_position = 0 if kind == "bert" else tokenizer.pad_token_id + 1
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max_positions + first_position,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(config)
    with tempfile.TemporaryDirectory() as plain_folder:
        backbone.save_pretrained(plain_folder)
        tokenizer.save_pretrained(plain_folder)
        modules = [Transformer(plain_folder), Pooling(hidden, "mean"), *([Normalize()] if normalize else [])]
        model = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")
        model.save_pretrained(str(folder), create_model_card=False)
    return folder


def _train_tokenizer(texts: Iterable[str], vocab: int, max_positions: int, kind: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS[kind]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = _train_pieces([normalizer.normalize_str(t) for t in texts], splitter, list(special.values()), vocab)
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=special["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, pieces[cls]), (sep, pieces[sep])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_positions,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
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
