"""What encoder to train; the ``model.encoder`` part of a config."""

from dataclasses import dataclass
from typing import Literal, Optional, Union


@dataclass
class EncoderSpec:
    """The encoder to fine-tune. ``auto`` takes what the folder says; an override is said in the log.

    Attributes:
        backbone: hub id or folder of a sentence-transformers or plain transformers model.
        max_length: pieces kept of a text, special tokens included; unset: what the folder says.
        pooling: how token vectors become one vector.
        normalize: scale embeddings to length 1.
        prompt: put before every text; unset: the folder's default prompt.
        compact_vocabulary: train only the embedding rows that training texts use (exact; auto), or all (off).
        dropout: overrides every dropout rate of the backbone; unset: its own.
        revision: of a hub id.
        trust_remote_code: run Python code that comes with the model.
    """

    backbone: str
    max_length: Optional[int] = None
    pooling: Literal["auto", "mean", "cls", "max", "last"] = "auto"
    normalize: Union[bool, Literal["auto"]] = "auto"
    prompt: Optional[str] = None
    compact_vocabulary: Literal["auto", "off"] = "auto"
    dropout: Optional[float] = None
    revision: Optional[str] = None
    trust_remote_code: bool = False
