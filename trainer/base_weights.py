"""Weights that a run does not train: checkpoints leave them to the folder of the backbone, and know it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.encoder import Encoder, EncoderSpec


class BaseWeights:
    """What the backbones of a run have and its checkpoints do not: frozen layers, and the rows of unused pieces.

    Args:
        specs: of the encoders.
        parts: the encoders, by the prefix of their weights' names. Make it before a strategy takes weights apart.
    """

    def __init__(self, specs: Sequence[EncoderSpec], parts: Mapping[str, Encoder]) -> None:
        self._specs, self._parts = specs, parts
        self._frozen = {prefix: part.base_checksum() for prefix, part in parts.items() if part.base_names}
        self._matrices: dict[str, str] = {}  # checksums of the whole embedding matrices

    def leave_out(self, checkpoint: dict[str, Any]) -> None:
        """Let a Lightning checkpoint name the weights that the backbone's folder has instead of holding them."""
        for prefix, part in self._parts.items():
            if part.vocabulary is not None:
                checkpoint[f"{prefix}base_vocabulary"] = self._matrix(prefix)
            if prefix in self._frozen:
                checkpoint[f"{prefix}base_weights"] = self._frozen[prefix]
                for name in part.base_names:
                    # Other ranks than the first may hold none.
                    checkpoint["state_dict"].pop(f"encoder.{prefix}{name}", None)

    def fill_in(self, checkpoint: dict[str, Any], is_training: bool) -> None:
        """Put these weights back, and make the vocabulary fit the checkpoint's.

        Raises:
            ValueError: they are not those of the run that saved, or its texts used other pieces.
        """
        for spec, prefix in zip(self._specs, self._parts, strict=True):
            self._fill_in(spec, prefix, checkpoint, is_training)

    def _fill_in(self, spec: EncoderSpec, prefix: str, checkpoint: dict[str, Any], is_training: bool) -> None:
        state, part = checkpoint["state_dict"], self._parts[prefix]
        names = part.base_names
        if checkpoint.get(f"{prefix}base_weights") != self._frozen.get(prefix):
            raise ValueError(
                f"the frozen weights of '{spec.backbone}' are not those the checkpoint was trained with: "
                "restore the backbone folder or its revision, and freeze and lora of its run"
            )
        state.update({f"encoder.{prefix}{name}": part.get_parameter(name).detach() for name in names})
        held = (key for key in state if key.startswith(f"encoder.{prefix}") and key.endswith(".used_ids"))
        name = next(held, None)
        if name is None:
            return
        vocabulary = part.vocabulary
        if vocabulary is None or not torch.equal(vocabulary.used_ids.cpu(), state[name].cpu()):
            if vocabulary is not None and is_training:
                raise ValueError(
                    f"the checkpoint was trained on texts with {len(state[name])} distinct pieces, this data has "
                    f"{len(vocabulary.used_ids)} others: go on with the same data, or start from its model/ folder"
                )
            part.compact_vocabulary(state[name])
        if self._matrix(prefix) != checkpoint[f"{prefix}base_vocabulary"]:
            raise ValueError(
                f"the embedding matrix of '{spec.backbone}' is not the one the checkpoint was trained "
                "from: restore the backbone folder or its revision"
            )

    def _matrix(self, prefix: str) -> str:
        if prefix not in self._matrices:
            vocabulary = self._parts[prefix].vocabulary
            assert vocabulary is not None
            self._matrices[prefix] = vocabulary.base_checksum()
        return self._matrices[prefix]
