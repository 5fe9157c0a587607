"""What a training step needs on one device, by arithmetic, or measured on the longest batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from trainer.encoder.size import BackboneSize


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. An estimate: allocators, kernels, libraries and the loss come on top.

    Attributes:
        weights: 4 for each parameter, and 4 more for each row of the embedding matrix that compaction copies.
        gradients: 4 for each trained parameter.
        optimizer: AdamW's two moments, 8 for each trained parameter; 0 for plain SGD.
        activations: what one forward keeps for its backward, a trained layer and token w (4 H + 4 A + 2 F) + 2 H, for
            w bytes a number (2 in half precision, else 4), width H, width A of all heads and feed-forward width F:
            inputs of the two norms, of q, k, v, q, k, v themselves, what goes into both projections, both sides of the
            activation, two dropout masks. A gated feed-forward keeps 4 F: both branches, one activated, the product.
            Attention matrices are never stored whole. Korthikanti et al. 2022,
            https://arxiv.org/abs/2205.05198.
        num_parameters, num_trained: parameters in all, and those that a step changes.
        num_tokens: of the forward that activations are of.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    num_parameters: int
    num_trained: int
    num_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Sharing:
    """How ZeRO shares training state out.

    Attributes:
        stage: 1 optimizer state, 2 also gradients, 3 also parameters.
        num_ranks: that share it.
        offload: the host's memory holds optimizer state, and under stage 3 parameters.
        live_parameters: that a rank holds whole at a time under stage 3.
    """

    stage: int
    num_ranks: int
    offload: bool
    live_parameters: int

    def of(self, whole: Memory) -> Memory:
        """What is left of ``whole`` on one device. Who steps on a share keeps a copy of its parameters too."""
        moments = 0 if self.offload else (whole.optimizer + 4 * whole.num_trained) // self.num_ranks
        gradients = whole.gradients // self.num_ranks if self.stage > 1 else whole.gradients
        weights = whole.weights
        if self.stage > 2:
            live = 4 * min(self.live_parameters, whole.num_parameters)
            weights = min(whole.weights, live + (0 if self.offload else whole.weights // self.num_ranks))
        return replace(whole, weights=weights, gradients=gradients, optimizer=moments)


def together(parts: Sequence[Memory]) -> Memory:
    """Of encoders that are trained in one step: what each forward keeps is there until the backward."""
    return Memory(*map(sum, zip(*map(astuple, parts), strict=True)))


def estimate(size: BackboneSize, num_used: int | None, num_tokens: int, is_half: bool, has_moments: bool) -> Memory:
    """Memory of one rank that holds all state itself: one process, or DDP.

    Args:
        num_used: rows of the embedding matrix that are trained; None: all.
        num_tokens: of the largest forward.
        is_half: bf16 or fp16 autocast.
        has_moments: AdamW.
    """
    if not size.trains_pieces:
        num_used = None
    copied = 0 if num_used is None else num_used
    frozen = 0 if num_used is None else size.num_pieces
    trained = size.num_trained + (copied - frozen) * size.piece_width
    width = 2 if is_half else 4
    feed_forward = (4 if size.is_gated else 2) * size.intermediate
    per_token = width * (4 * size.hidden + 4 * size.attention + feed_forward) + 2 * size.hidden
    return Memory(
        weights=4 * (size.num_parameters + copied * size.piece_width),
        gradients=4 * trained,
        optimizer=8 * trained if has_moments else 0,
        activations=num_tokens * (size.num_layers - size.num_frozen) * per_token,
        num_parameters=size.num_parameters,
        num_trained=trained,
        num_tokens=num_tokens,
    )
