"""The siamese encoder: a transformers backbone, and sentence-transformers' own modules behind it.

Shape suffixes: T tokens of the stream, S segments (texts), H hidden, D embedding, B rows of this rank.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder.attention import PACKED_ATTENTION, Packing, padded_layout, plan_buckets
from trainer.encoder.dropout import HostDropout, use_host_dropout
from trainer.encoder.fused_layer import use_fused_layers
from trainer.encoder.mpnet import take_packing
from trainer.encoder.shell import drop_messages, override_modules, share_tokenizer, take_route
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation, load_text_preparation, position_offset
from trainer.encoder.trainable import blocks, merged_adapters, restrict
from trainer.encoder.vocabulary import CompactEmbedding
from trainer.encoder.weights import refuse_broken_weights
from trainer.manifest import tensor_digest

logger = logging.getLogger(__name__)

# Backbones whose attention goes through transformers' interface (MPNet's: mpnet.py), and whose positions, learned or
# rotary, are told.
PACKED_MODEL_TYPES = frozenset(
    {"albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "gemma3_text", "gte"}
    | {"jina_embeddings_v3", "llama", "mistral", "modernbert", "mpnet", "nomic_bert", "qwen2", "qwen3", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"}
)
# Their convolutions, Fourier transforms and hashes know of no mask: padding would change the text beside it.
_UNMASKED_MODEL_TYPES = frozenset({"convbert", "fnet", "mobilebert", "yoso"})
# oneDNN writes kernels for each number of rows of a bf16 product that it meets (0.5 ms and 0.7 MB each, up to 1,024 are
# kept), so a CPU gets few different ones.
_TOKEN_STEP = 32
# Left out of a training step at random, or noise added to it, beside dropout: whole layers (BART, OPT), what a router
# of experts reads (Mixtral, Switch).
_OTHER_NOISE = frozenset({"layerdrop", "jitter_noise", "input_jitter_noise"})


class Encoder(nn.Module):
    """Texts to embeddings.

    Args:
        spec: what to load.
        max_tokens: tokens of one forward; a longer batch is embedded chunk by chunk, all but the last under activation
            checkpointing (one graph, one backward, dropout replayed).
        text: what prepares the texts, if somebody has read it already: a tokenizer of 250,000 pieces takes 280 MB.

    Raises:
        ValueError: a backbone that can't be read, or max_length over its positions.
    """

    def __init__(self, spec: EncoderSpec, max_tokens: int, text: TextPreparation | None = None) -> None:
        super().__init__()
        self.text = load_text_preparation(spec) if text is None else text
        try:
            shell = SentenceTransformer(
                spec.backbone,
                device="cpu",
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                model_kwargs={"dtype": torch.float32},
            )
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            refuse_broken_weights(spec)
            if not isinstance(error, pickle.UnpicklingError):
                raise
            raise ValueError(
                f"model.encoder.backbone '{spec.backbone}': its weights are a pickle that holds more than tensors, "
                "which could run code; take a copy in safetensors from someone you trust"
            ) from error
        drop_messages(shell)
        if spec.route is not None:
            shell = take_route(shell, spec.route, self.text.prompt)
        self._as_saved = share_tokenizer(shell, self.text)
        shell.max_seq_length = self.text.max_length
        override_modules(shell, spec)
        # A tuple hides the shell from nn.Module: its modules are registered below, once.
        self._shell = (shell,)
        transformer, *head = list(shell)
        backbone = transformer.model
        assert isinstance(backbone, PreTrainedModel)
        self.backbone = backbone
        self.head = nn.Sequential(*head)
        self.max_tokens = max_tokens
        # Where a forward is a collective (ZeRO-3), all ranks must run the same number of them.
        self.lockstep = False
        # What a compacted vocabulary stands in for, without its rows; hidden from nn.Module.
        self._embedding: tuple[nn.Embedding, ...] = ()
        self._position_offset = position_offset(self.backbone.config)
        # Some configs ask for a tuple.
        self._options = {"return_dict": True}
        if getattr(self.backbone.config, "use_cache", False):
            self._options["use_cache"] = False  # decoders would keep keys and values for a next token that never comes
        # Code that came with the model may use the name of a type, and know of no other text in its stream.
        name, is_own = type(self.backbone).__name__, type(self.backbone).__module__.startswith("transformers.models.")
        self.packed = is_own and self.backbone.config.model_type in PACKED_MODEL_TYPES
        if self.packed:
            take_packing(self.backbone)
            self.backbone.set_attn_implementation(PACKED_ATTENTION)
        else:
            gather.warn(
                logger,
                f"backbone type '{self.backbone.config.model_type}'"
                + ("" if is_own else f" with Python code of its own ({name})")
                + " runs padded; packed forward: "
                + ", ".join(sorted(PACKED_MODEL_TYPES))
                + ("" if is_own else " of transformers"),
            )
        # Some make a vector more of it for each piece (GPT-2), or attend by it (XLNet). To packed ones nothing is told
        # where all are 0: they take that themselves, from a table of their own.
        takes_kinds = "token_type_ids" in signature(self.backbone.forward).parameters
        self._kinds = self.text.kinds if takes_kinds and (self.text.kinds or not self.packed) else None
        self._pads = self.packed or self.backbone.config.model_type not in _UNMASKED_MODEL_TYPES
        if not self._pads:
            gather.warn(
                logger,
                f"padding would change the embeddings of a '{self.backbone.config.model_type}', so a forward takes "
                "texts of one length; sentence-transformers pads, but for encode(..., batch_size=1)",
            )
        use_host_dropout(self.backbone)
        if spec.dropout is not None:
            self.set_dropout(spec.dropout)
        if spec.checkpoint_layers:
            _checkpoint_layers(self.backbone)
        restrict(self.backbone, spec, self.head)
        if spec.compile_layers:
            for layer in blocks(self.backbone):
                layer.compile(dynamic=True)  # once for all of them, for any number of tokens
        elif self.packed:
            use_fused_layers(self.backbone)
        self._has_adapters = spec.lora is not None
        self._keeps_base = spec.lora is not None or spec.freeze is not None

    @property
    def embedding_dimension(self) -> int:
        dimension = self._shell[0].get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def pools_prompt(self) -> bool:
        """Whether the pieces of a prompt are part of the embedding; the folder says it."""
        return all(module.include_prompt for module in self.head if isinstance(module, Pooling))

    def set_dropout(self, rate: float) -> None:
        """Set every dropout of the encoder, attention included; a rate of 0 ends ``_OTHER_NOISE`` too."""
        for module in list(self.modules()):
            if isinstance(module, nn.Dropout):
                module.p = rate
            # ModernBERT leaves out a dropout whose rate is 0.
            for name, child in module.named_children():
                if isinstance(child, nn.Identity) and "drop" in name:
                    setattr(module, name, HostDropout(rate))
            # Some attentions keep their rate as a plain number.
            for name, value in list(vars(module).items()):
                if "dropout" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                    setattr(module, name, rate)
                elif name in _OTHER_NOISE and not rate:
                    setattr(module, name, 0.0)
            # BigBird's attention is made anew at the first short text, by its config; the backbone's is exported.
            if hasattr(module, "set_attention_type") and hasattr(module, "config") and module is not self.backbone:
                own: Any = copy.deepcopy(module.config)
                own.attention_probs_dropout_prob = rate
                module.config = own

    @property
    def drops_layers(self) -> bool:
        """Whether a forward in training may leave out whole layers (LayerDrop)."""
        return any(getattr(module, "layerdrop", 0.0) for module in self.backbone.modules())

    @property
    def parts(self) -> dict[str, Encoder]:
        """Encoders inside this one, by the prefix of their weights' names: itself."""
        return {"": self}

    # -- vocabulary ---------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> CompactEmbedding | None:
        """The compacted embedding matrix, if it was compacted."""
        embedding = self.backbone.get_input_embeddings()
        return embedding if isinstance(embedding, CompactEmbedding) else None

    def compact_vocabulary(self, used_ids: Tensor) -> None:
        """Train only these rows of the embedding matrix (and those of special pieces); of a frozen one, none. One that
        does more than look rows up, and scale them, is left as it is."""
        vocabulary = self.vocabulary
        if vocabulary is not None:
            full, padding_id, scale = vocabulary.frozen_VH, vocabulary.padding_id, vocabulary.scale
        else:
            embedding = self.backbone.get_input_embeddings()
            assert isinstance(embedding.weight, Tensor)
            full, scale = embedding.weight, getattr(embedding, "embed_scale", None)
            if not full.requires_grad:
                return
            if not isinstance(embedding, nn.Embedding) or (type(embedding) is not nn.Embedding and scale is None):
                gather.warn(
                    logger,
                    f"compact_vocabulary: the {type(embedding).__name__} of this backbone is more than a table of "
                    "rows, so all of it is trained",
                )
                return
            padding_id, self._embedding = embedding.padding_idx, (embedding,)
            embedding.weight = nn.Parameter(full.new_empty(0), requires_grad=False)  # the compact one has the rows
        special = torch.tensor(self.text.tokenizer.all_special_ids, dtype=torch.int64)
        special = special[special < len(full)]  # a tokenizer may have more, which no text holds
        # GPT-2 looks the kinds of pieces up in this table too.
        kinds = torch.tensor([] if self._kinds is None else [0, *self._kinds.values()], dtype=torch.int64)
        used_ids = torch.unique(torch.cat([used_ids.to("cpu", torch.int64), special, kinds]))
        self.backbone.set_input_embeddings(CompactEmbedding(full, used_ids.to(full.device), padding_id, scale))

    # -- what is not trained ------------------------------------------------------------------------------

    @property
    def base_names(self) -> list[str]:
        """Weights that adapters or frozen layers leave as the backbone's folder has them."""
        frozen = self.backbone.named_parameters() if self._keeps_base else ()
        return [f"backbone.{name}" for name, parameter in frozen if not parameter.requires_grad]

    def base_checksum(self) -> str:
        """sha256 of those weights, so that a checkpoint is not continued on another base."""
        return tensor_digest((name, self.get_parameter(name)) for name in self.base_names)

    # -- forward ------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch) -> list[Tensor]:
        """Embeddings of the rows that count, one (B, D) tensor a column, float32."""
        return [column[: batch.num_rows] for column in self.embed(batch).chunk(batch.num_columns)]

    def embed(self, batch: PackedBatch) -> Tensor:
        """Embeddings of all texts of a batch, (S, D) float32, in column-major order."""
        chunks, num_idle = list(self._chunks(batch.lengths)), 0
        if self.lockstep:
            (num_chunks,) = gather.start_max([len(chunks)], batch.input_ids_T.device)()
            num_idle = num_chunks - len(chunks)
            chunks = [(slice(0, 1), slice(0, batch.lengths[0]))] * num_idle + chunks
        parts = []
        for number, (segments, tokens) in enumerate(chunks, start=1):
            # Made here: a forward that is computed again must meet the same jagged tensors.
            packing = plan_buckets(batch.lengths[segments], batch.input_ids_T.device)
            inputs = batch.input_ids_T[tokens], batch.positions_T[tokens], packing
            # The last graph is the first that backward consumes: it is gone before another chunk is embedded again.
            if number < len(chunks) and torch.is_grad_enabled():
                parts.append(checkpoint(self._embed_stream, *inputs, use_reentrant=False))
            else:
                parts.append(self._embed_stream(*inputs))
        # What an idle forward embeds stands behind the rest, where order_S does not look.
        return torch.cat(parts[num_idle:] + parts[:num_idle])[batch.order_S]

    def _chunks(self, lengths: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Consecutive segments within the token budget, as (segments, tokens); at least one segment each. The last is
        full, for it is embedded once and the others twice."""
        stops = [0, *accumulate(lengths)]
        bounds = [len(lengths)]
        for i in reversed(range(len(lengths))):
            last = bounds[-1]
            # Lengths ascend: a padded forward is as wide as its last segment.
            cost = stops[last] - stops[i] if self.packed else (last - i) * lengths[last - 1]
            is_apart = not self._pads and lengths[i] < lengths[last - 1]
            if i < last - 1 and (cost > self.max_tokens or is_apart):
                bounds.append(i + 1)
        bounds.append(0)
        for start, stop in pairwise(reversed(bounds)):
            yield slice(start, stop), slice(stops[start], stops[stop])

    def _embed_stream(self, input_ids_T: Tensor, positions_T: Tensor, packing: Packing) -> Tensor:
        lengths, device, num_tokens = packing.lengths, packing.device, len(input_ids_T)
        if self.packed:
            if device.type == "cpu" and (num_padding := -num_tokens % _TOKEN_STEP):
                # Any piece whose row is trained: nothing attends to it, nothing is pooled of it.
                input_ids_T = F.pad(input_ids_T, (0, num_padding), value=int(input_ids_T[0]))
                positions_T = F.pad(positions_T, (0, num_padding))
            hidden_TH = self.backbone(
                input_ids=input_ids_T[None],
                position_ids=self._places(input_ids_T, positions_T)[None],
                packing=packing,
                **self._kinds_of(input_ids_T[None]),
                **self._options,
            ).last_hidden_state.squeeze(0)
            if len(hidden_TH) > num_tokens:
                hidden_TH = hidden_TH[:num_tokens]
        else:
            hidden_TH = self._padded_forward(input_ids_T, lengths)
        lengths_S = torch.tensor(lengths)
        boundaries = F.pad(lengths_S.cumsum(0), (1, 0))
        segment_T = torch.arange(len(lengths)).repeat_interleave(lengths_S)
        features: dict[str, Any] = {
            "token_embeddings": hidden_TH[None],
            "cu_seq_lens_q": boundaries.to(device, non_blocking=True),
            # Counted on the device, it would make the host wait for its size.
            "seq_idx": segment_T[None].to(device, non_blocking=True),
        }
        if self.text.prompt:
            features["prompt_length"] = self.text.prompt_length
        return self.head(features)["sentence_embedding"].float()

    def _places(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Places in the position table. Where it starts behind the padding index, a pad piece that stands in a text is
        not counted, and has the place of padding."""
        if not self._position_offset:
            return positions_T
        padding = self._position_offset - 1
        counted_T = (input_ids_T != padding).long()
        until_T = counted_T.cumsum(0)
        starts_T = torch.arange(len(positions_T), device=positions_T.device) - positions_T
        return (until_T - (until_T - counted_T)[starts_T]) * counted_T + padding

    def _kinds_of(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What a backbone that asks for them is told of the kinds of pieces; shaped as the ids."""
        if self._kinds is None:
            return {}
        kinds = torch.zeros_like(input_ids)
        for piece, kind in self._kinds.items():
            kinds.masked_fill_(input_ids == piece, kind)
        return {"token_type_ids": kinds}

    def _padded_forward(self, input_ids_T: Tensor, lengths: Sequence[int]) -> Tensor:
        device = input_ids_T.device
        mask, real = padded_layout(torch.tensor(lengths))
        real = real.to(device, non_blocking=True)
        pad = self.text.tokenizer.pad_token_id
        input_ids = torch.full((mask.numel(),), pad, dtype=torch.int64, device=device)
        input_ids = input_ids.index_copy(0, real, input_ids_T).view(mask.shape)
        inputs = {"input_ids": input_ids, "attention_mask": mask.to(device=device, dtype=torch.int64)}
        inputs |= self._kinds_of(input_ids)
        hidden = self.backbone(**inputs, **self._options).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, real)

    # -- export -------------------------------------------------------------------------------------------

    @contextmanager
    def as_sentence_transformer(self) -> Iterator[SentenceTransformer]:
        """The same weights as a plain sentence-transformers model inside the block: full vocabulary, adapters added
        in, stock attention, evaluation mode."""
        shell, vocabulary, training = self._shell[0], self.vocabulary, self.training
        if vocabulary is not None:
            embedding = self._embedding[0]
            embedding.to(vocabulary.weight.device).weight = nn.Parameter(vocabulary.full_weight(), requires_grad=False)
            self.backbone.set_input_embeddings(embedding)
        if self.packed:
            self.backbone.set_attn_implementation("sdpa")
        shell.eval()
        self._as_saved()
        try:
            # Layers are compiled for the packed stream.
            with (
                torch.compiler.set_stance("force_eager"),
                merged_adapters(self.backbone) if self._has_adapters else nullcontext(),
            ):
                yield shell
        finally:
            if vocabulary is not None:
                self.backbone.set_input_embeddings(vocabulary)
                embedding.weight = nn.Parameter(vocabulary.weight.new_empty(0), requires_grad=False)
            if self.packed:
                self.backbone.set_attn_implementation(PACKED_ATTENTION)
            self.train(training)


def _checkpoint_layers(backbone: PreTrainedModel) -> None:
    if not backbone.supports_gradient_checkpointing:
        raise ValueError(
            f"model.encoder.checkpoint_layers is true, but transformers can't compute the layers of "
            f"'{backbone.config.model_type}' again: set it to false, and lower model.max_tokens or max_length"
        )
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
