"""A folder in the layout of the real data, generated: for machines that have none (gpu.py).

Words are numbers, drawn as often as words are (Zipf); texts have about the lengths of the real sets. One word is one
piece, so the tokenizer of the other side has less to do than with real text.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUM_WORDS = 30_000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Text = Callable[[float, float], str]


def write_folder(folder: Path, num_rows: int, num_words: int = NUM_WORDS, length: float = 1.0, seed: int = 0) -> Path:
    """The training files of all shapes and their tokenizers.

    Args:
        num_rows: of NLI, which the largest batches are of; the others have 10,000 at most.
        length: of the texts, as a multiple of the real ones.
    """
    rng = random.Random(seed)
    weights = [1 / (rank + 10) for rank in range(num_words)]
    drawn = iter(rng.choices(range(num_words), weights, k=1_000_000))

    def text(mean: float, most: float) -> str:
        """Lengths fall off as those of sentences do: log-normal, half of them below 0.8 of the mean."""
        nonlocal drawn
        number = max(1, min(int(most * length), round(length * mean * rng.lognormvariate(-0.22, 0.66))))
        words = [word for word, _ in zip(drawn, range(number), strict=False)]
        if len(words) < number:
            drawn = iter(rng.choices(range(num_words), weights, k=1_000_000))
            words += [next(drawn) for _ in range(number - len(words))]
        return " ".join(f"w{word}" for word in words)

    for name, rows in _files(text, rng).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
            most = num_rows if name.startswith("nli") else min(num_rows, 10_000)
            for _, row in zip(range(most), rows, strict=False):
                file.write(json.dumps(row) + "\n")
    for name in ("mbert", "xlmr", "minilm"):
        _tokenizer(num_words).save_pretrained(str(folder / "tokenizers" / name))
    return folder


def _files(text: Text, rng: random.Random) -> dict[str, Iterator[dict[str, Any]]]:
    """Mean and longest number of words as the real tokenizers cut the real texts, special pieces not counted."""
    labels = ("entailment", "neutral", "contradiction")

    def endless(row: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            yield row()

    return {
        "nli/nli-300k.train.jsonl.gz": endless(
            lambda: {"premise": text(34, 157), "hypothesis": text(17.5, 68), "label": rng.choice(labels)}
        ),
        "bitext/tanaka-ja-en.train.jsonl.gz": endless(lambda: {"ja": text(11, 60), "en": text(9, 40)}),
        "qa/chatbot-ko.train.jsonl.gz": endless(lambda: {"question": text(6, 30), "answer": text(7, 40)}),
        "sts/stsb-en.train.jsonl.gz": endless(
            lambda: {"sentence1": text(12, 80), "sentence2": text(12, 80), "score": round(rng.uniform(0, 5), 2)}
        ),
        "labelled/intents-ko.train.jsonl.gz": endless(lambda: {"text": text(20, 80), "label": rng.randrange(7)}),
    }


def _tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    pieces = {piece: number for number, piece in enumerate((*SPECIAL, *(f"w{word}" for word in range(num_words))))}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(piece, pieces[piece]) for piece in ("[CLS]", "[SEP]")]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )
