"""What encoder to train; the ``model.encoder`` part of a config."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Optional, Union


@dataclass
class LoRA:
    """Low-rank adapters: the backbone stays as it is, and a small product of two matrices beside each linear layer is
    trained. The exported folder holds the sum, and loads without peft.

    Attributes:
        r: rank of the product.
        alpha: the product is scaled by alpha / r.
        dropout: before the product.
        target_modules: names of linear layers in a block, e.g. [query, value]; auto: all of them.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Union[Literal["auto"], list[str]] = "auto"

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"model.encoder.lora has r {self.r} and alpha {self.alpha}; both must be 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.encoder.lora.dropout is {self.dropout:g}; it is a rate, 0 to below 1")
        if not self.target_modules:
            raise ValueError("model.encoder.lora.target_modules is empty; name linear layers, or take auto")


@dataclass
class EncoderSpec:
    """The encoder to fine-tune. ``auto`` takes what the folder says; an override is said in the log.

    Attributes:
        backbone: hub id or folder of a sentence-transformers or plain transformers model.
        max_length: pieces kept of a text, special tokens included; unset: what the folder says, up to 8,192.
        pooling: how token vectors become one vector.
        normalize: scale embeddings to length 1.
        prompt: put before every text; unset: the folder's default prompt.
        compact_vocabulary: train only the embedding rows that training texts use (exact; auto), or all (off).
        dropout: overrides every dropout rate of the backbone; 0 ends dropped layers and noise of routers too; unset:
            its own.
        freeze: leave the embeddings and this many of the first layers as they are; 0: the embeddings alone; unset:
            train all.
        checkpoint_layers: keep what goes into each layer, and compute the rest again in the backward: less memory where
            single texts are long, a third more time. Many texts need no such thing: max_tokens bounds their forward.
        compile_layers: let torch.compile write the kernels of the layers (needs a C++ compiler, and a minute at the
            first step). On a CPU it gains nothing; on a GPU it is not measured yet.
        lora: train low-rank adapters instead of the backbone's own weights.
        route: which encoder of a folder with several (a Router of sentence-transformers): query or document.
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
    freeze: Optional[int] = None
    checkpoint_layers: bool = False
    compile_layers: bool = False
    lora: Optional[LoRA] = None
    route: Optional[str] = None
    revision: Optional[str] = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.encoder.dropout is {self.dropout:g}; it is a rate, 0 to below 1")


@contextmanager
def errors_about(part: str) -> Iterator[None]:
    """Errors about an encoder inside the block are about another part of the config than ``model.encoder``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.encoder", part)) from error
