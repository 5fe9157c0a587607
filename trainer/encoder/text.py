"""From text to token ids: tokenizer, truncation and prompt of an encoder, without its weights."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from trainer.distributed import gather
from trainer.encoder.folder import OWN_MODULES, read_json, read_modules, read_transformer, refuse_broken_json
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.unsupported import refuse_modules, refuse_settings
from trainer.messages import cause_of

logger = logging.getLogger(__name__)

# Position tables of these start behind the padding index.
_OFFSET_MODEL_TYPES = frozenset(
    {"camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)

# A tokenizer holds the length it truncates to, and columns, sources and threads share one.
_one_at_a_time = threading.Lock()

TASKS = ("query", "document")

_NO_LIMIT = 1 << 31  # pieces, more than any text has
_LONGEST = 8192  # pieces kept of a text where the config does not say


@dataclass
class TextPreparation:
    """Turns texts into token ids exactly as the exported sentence-transformers folder will.

    Attributes:
        tokenizer: a fast tokenizer with its special tokens.
        max_length: pieces kept of a text, special tokens included.
        prompt: put before every text; empty for none.
        max_lengths: of text columns that keep fewer pieces; by name.
        documents: of the document tower, where queries and documents have an encoder each; None: one for all texts.
        hash_seed: of the hashes of its texts; not 0 where their pieces are not those of the query tower.
        num_rows: of the embedding, where the tokenizer has pieces beyond them; None: it has none.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    prompt: str = ""
    max_lengths: dict[str, int] = field(default_factory=dict)
    documents: TextPreparation | None = None
    hash_seed: int = 0
    num_rows: int | None = None

    def of_column(self, column: str) -> TextPreparation:
        """What turns the texts of a column into token ids."""
        text = self if self.documents is None or column == "anchor" else self.documents
        return replace(text, max_length=self.max_lengths.get(column, text.max_length), max_lengths={}, documents=None)

    @property
    def towers(self) -> list[str]:
        """Whose texts there are: query where one encoder takes all, else document too."""
        return ["query"] if self.documents is None else ["query", "document"]

    def tower_of(self, column: str) -> str:
        """Whose texts stand in a column."""
        return "query" if self.documents is None or column == "anchor" else "document"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text.

        Raises:
            ValueError: a text has a piece that the embedding has no row for.
        """
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        # What calling the tokenizer does, without the objects it makes per text, which cost a third of the time.
        with _one_at_a_time:
            self.tokenizer.set_truncation_and_padding(  # type: ignore[attr-defined]
                padding_strategy=PaddingStrategy.DO_NOT_PAD,
                truncation_strategy=TruncationStrategy.LONGEST_FIRST,
                max_length=self.max_length,
                stride=0,
                pad_to_multiple_of=None,
                padding_side=None,
            )
            encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts))  # type: ignore[attr-defined]
        ids = [text.ids for text in encoded]
        if self.num_rows is not None:
            for one in ids:
                _refuse_beyond("a text holds", self.tokenizer, max(one, default=0), self.num_rows)
        return ids

    @cached_property
    def prompt_length(self) -> int:
        """Pieces of the prompt, the leading special token included: what pooling may leave out."""
        if not self.prompt:
            return 0
        ids = self([""])[0]
        # A trailing separator is not part of the prompt when text follows it.
        return len(ids) - (1 if ids and ids[-1] in self.tokenizer.all_special_ids else 0)

    @cached_property
    def shortest(self) -> int:
        """Pieces that every text has: the special ones and those of the prompt."""
        special = self.tokenizer.num_special_tokens_to_add(pair=False)
        return max(special, len(self.shared)) if self.prompt else special

    @cached_property
    def shared(self) -> list[int]:
        """Ids that every text has: the special ones and those of the prompt."""
        # A blank behind the prompt is often a piece only where no text follows.
        return replace(self, prompt=self.prompt.rstrip(), max_length=_NO_LIMIT)([""])[0]

    @cached_property
    def no_text(self) -> list[int]:
        """Pieces that stand where a row has no text: the special ones, or one where the tokenizer has none."""
        if self.documents is not None:
            return self.documents.no_text  # negatives may lack, never a query
        return replace(self, prompt="")([""])[0] or [self.tokenizer.pad_token_id]

    @cached_property
    def kinds(self) -> dict[int, int] | None:
        """Special piece to its token_type_id, where it is not 0 as that of text; None where the tokenizer is set to
        return none of them."""
        if "token_type_ids" not in self.tokenizer.model_input_names:
            return None
        one = self.tokenizer("a")
        return {piece: kind for piece, kind in zip(one["input_ids"], one["token_type_ids"], strict=True) if kind}

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # Both are set by the last call, not by the tokenizer's files.
        backend["truncation"] = backend["padding"] = None
        knobs = [backend, self.max_length, self.prompt, *([self.max_lengths] if self.max_lengths else [])]
        if self.num_rows is not None:
            knobs.append(self.num_rows)  # else what a larger embedding let pass would be taken from the cache
        if self.tokenizer.truncation_side != "right":
            knobs.append(self.tokenizer.truncation_side)
        if self.documents is not None:
            knobs.append(self.documents.fingerprint)
        return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:16]


def num_positions(config: PretrainedConfig) -> int | None:
    """Longest text the backbone has positions for; None where positions are not learned."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    return positions - position_offset(config)


def position_offset(config: PretrainedConfig) -> int:
    """Place of a text's first piece in the position table."""
    return config.pad_token_id + 1 if config.model_type in _OFFSET_MODEL_TYPES else 0


def _batch_free_length(config: PretrainedConfig) -> int | None:
    """Pieces up to which the longest text of a batch changes nothing for the others; None: of any length."""
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        return (5 + 2 * config.num_random_blocks) * config.block_size
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # for all layers, or by their type
    return min(
        (one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"), default=None
    )


def load_text_preparation(spec: EncoderSpec) -> TextPreparation:
    """Read the tokenizer, the length and the prompt of an encoder; no weights.

    Raises:
        ValueError: no such folder or hub id, a damaged file, a checkpoint, a model that begins with no Transformer,
            modules or settings of sentence-transformers that are not supported, code that was not allowed, a tokenizer
            without tokenizer.json or a pad piece, one that pads with a piece the embedding has no row for, or
            max_length over the positions of the backbone, over the length up to which it embeds a text alone as in any
            batch, or with no room for a text.
    """
    where: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    modules = read_modules(spec)
    refuse_broken_json(spec)
    refuse_modules(spec, modules)
    subfolder = modules[0]["path"]
    transformer = read_transformer(spec, subfolder)
    if modules[0]["type"].startswith(OWN_MODULES):
        refuse_settings(spec, transformer)
    for_tokenizer = transformer.get("processor_kwargs") or transformer.get("tokenizer_args") or {}
    try:
        config = AutoConfig.from_pretrained(spec.backbone, subfolder=subfolder, **where)
        tokenizer = AutoTokenizer.from_pretrained(spec.backbone, **for_tokenizer | {"subfolder": subfolder} | where)
    except OSError as error:
        cause = cause_of(error)
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' is neither a model folder nor a reachable hub id: {cause}"
        ) from error
    except ValueError as error:  # a config.json without model_type, or of a type that transformers does not know
        refuse_broken_json(spec, "tokenizer.json")  # large, so not read before
        cause = cause_of(error)
        raise ValueError(f"model.encoder.backbone '{spec.backbone}' can't be read by transformers: {cause}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' has a tokenizer in Python ({type(tokenizer).__name__}), and "
            "texts are read by fast ones: take a backbone whose folder holds a tokenizer.json"
        )
    if tokenizer.pad_token_id is None:  # sentence-transformers pads every batch
        raise ValueError(
            f"model.encoder.backbone '{spec.backbone}' has a tokenizer without a pad piece, and sentence-transformers "
            "can't encode without one: set tokenizer.pad_token to a piece it has (its eos_token, say), and save the "
            "tokenizer there"
        )
    model = read_json(spec, "config_sentence_transformers.json") or {}
    positions = num_positions(config)
    # Padding on the left moves a text along a table that counts from the first place; others follow the text.
    is_table = positions is not None and config.model_type not in _OFFSET_MODEL_TYPES
    if tokenizer.padding_side == "left" and is_table and not getattr(config, "rope_parameters", None):
        gather.warn(
            logger,
            f"padding_side: the tokenizer of '{spec.backbone}' pads on the left, which would give a text other "
            "positions in each batch of sentence-transformers; the model that is saved pads on the right",
        )
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # the second is what is saved
    max_length = spec.max_length
    if max_length is None:
        said = for_tokenizer.get("model_max_length") or transformer.get("max_seq_length") or tokenizer.model_max_length
        said = min(said, positions or said)
        max_length = min(said, _LONGEST)
        if max_length < said < _NO_LIMIT:
            gather.warn(
                logger,
                f"max_length: '{spec.backbone}' takes {said:,} pieces, texts are cut at {max_length:,}; set "
                "max_length for more",
            )
    # Where DeBERTa adds no positions to the pieces, the table has no say.
    if positions is not None and max_length > positions and getattr(config, "position_biased_input", True):
        raise ValueError(
            f"model.encoder.max_length is {max_length}, but '{spec.backbone}' has {positions} positions; "
            f"set max_length to {positions} or less"
        )
    alike = _batch_free_length(config)
    if alike is not None and max_length > alike:
        raise ValueError(
            f"model.encoder.max_length is {max_length}, but a batch with a text of more than {alike} pieces makes "
            f"'{spec.backbone}' embed all of its texts in another way (block_sparse attention, or longrope positions); "
            f"set max_length to {alike} or less"
        )
    prompt = spec.prompt
    if prompt is None:
        prompts = model.get("prompts") or {}
        if spec.route in TASKS:
            prompt = task_prompt(prompts, spec.route)
        else:
            prompt = prompts.get(model.get("default_prompt_name") or "") or ""
    if transformer.get("do_lower_case"):
        _lower_first(tokenizer)
    # Published tokenizers have pieces beyond the rows that no text holds, and work.
    num_rows = getattr(config, "vocab_size", None)
    if num_rows is not None:
        _refuse_beyond("texts are padded with", tokenizer, tokenizer.pad_token_id, num_rows)
        if max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder]) < num_rows:
            num_rows = None
    text = TextPreparation(tokenizer, max_length, prompt, num_rows=num_rows)
    if max_length <= text.shortest:
        _refuse_no_room(text, positions)
    return text


def _refuse_no_room(text: TextPreparation, positions: int | None) -> None:
    special = replace(text, prompt="").shortest
    raised = f"set max_length to {text.shortest + 1} or more"
    if text.shortest == special:
        raise ValueError(
            f"model.encoder.max_length is {text.max_length}, but {special} pieces of every text are special; {raised}"
        )
    fits = positions is None or text.shortest < positions
    raise ValueError(
        f"the prompt '{text.prompt[:40]}{'...' * (len(text.prompt) > 40)}' has {text.shortest - special} pieces, and "
        f"model.encoder.max_length is {text.max_length}, {special} special ones included: no text is left; take a "
        f"shorter prompt{f', or {raised}' * fits}"
    )


def _refuse_beyond(cause: str, tokenizer: PreTrainedTokenizerBase, piece: int, num_rows: int) -> None:
    if piece >= num_rows:
        raise ValueError(
            f"{cause} '{tokenizer.convert_ids_to_tokens(piece)}', piece {piece:,} (from 0) of the tokenizer of "
            f"'{tokenizer.name_or_path}', but the embedding has {num_rows:,} rows: call resize_token_embeddings on the "
            "model and save both, or take the piece out of the tokenizer"
        )


def task_prompt(prompts: Mapping[str, str | None], task: str) -> str:
    """What encode_query or encode_document puts before a text: a loaded model has a prompt of just that name, empty
    where its folder names none, so neither its default nor another name (passage, corpus) is ever taken."""
    return prompts.get(task) or ""


def _lower_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lower texts inside the tokenizer, as sentence-transformers does for old folders that ask for it.
    ``str.lower`` differs: at a word's last sigma, and in special pieces that stand in a text."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    parts = [] if backend.normalizer is None else [backend.normalizer]
    if isinstance(backend.normalizer, normalizers.Sequence):
        parts = [backend.normalizer[i] for i in range(len(backend.normalizer))]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
