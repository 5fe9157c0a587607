"""The report at the start of a fit: errors stop it on every rank before the backbone's weights are read."""

import socket
from pathlib import Path
from typing import Optional, Union

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from trainer.check.render import refusal, short_lines
from trainer.check.report import FILE_NAME, Report, make_report
from trainer.data.module import PairData
from trainer.distributed import gather
from trainer.files import write_whole
from trainer.identity import split_names
from trainer.manifest import read_manifest
from trainer.module import EmbeddingModule


class Check(Callback):
    """Looks at the data before a fit: what its loss can't use stops the run, what is doubtful is said.

    Args:
        allow: errors that shall not stop the run, e.g. constant_labels,label_range; they stand in check.json and in
            the model card. `trainer check` names them.

    Attributes:
        found: the checkpoint to go on from, or to evaluate; None: a fresh start.
    """

    def __init__(self, allow: Optional[Union[str, list[str]]] = None) -> None:
        self.allow = allow
        self.found: Optional[Path] = None

    @property
    def names(self) -> list[str]:
        return split_names(self.allow)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning calls it when the data is set up and the module has no encoder yet.

        Raises:
            ValueError: the report has errors, or ranks have found other checkpoints; on all ranks, with the same text.
        """
        refuse_ranks_elsewhere(self.found)  # before anything that only some of them would do
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PairData)
        if stage != "fit" or self.found or data.stream is not None:  # of a stream nothing is known yet
            return
        refused = ""
        if gather.rank() == 0:  # the others wait below
            try:
                report = self._report(trainer, pl_module, data)
            except ValueError as error:
                refused = str(error)
            else:
                write_whole(Path(trainer.default_root_dir) / FILE_NAME, report.to_json())
                console = Console()
                for line in short_lines(report):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                refused = refusal(report)
        if refused := gather.broadcast_object(refused):
            raise gather.SharedError(refused)

    def _report(self, trainer: Trainer, pl_module: LightningModule, data: PairData) -> Report:
        assert isinstance(pl_module, EmbeddingModule)
        return make_report(
            pl_module,
            data,
            steps_per_epoch=data.steps_per_epoch,
            num_steps=pl_module.num_training_steps,
            num_ranks=gather.world_size(),
            is_half="16" in str(trainer.precision),
            strategy=trainer.strategy,
            allow=self.names,
        )


def refuse_ranks_elsewhere(found: Optional[Path]) -> None:
    """Each rank looks for the checkpoint by itself, where its own host has the run directory: all must have found one
    and the same, or none.

    Raises:
        SharedError: they have not.
    """
    mine = (read_manifest(found)["files"], str(found)) if found else (None, "no checkpoint")
    ranks = gather.gather_objects((*mine, f"rank {gather.rank()} on {socket.gethostname()}"))
    files, path, first = ranks[0]
    for other_files, other_path, other in ranks[1:]:
        if other_files != files:
            raise gather.SharedError(
                f"{first} has found {path}, but {other} {other_path}: the run directory must lie where all nodes see "
                "the same files; name such a folder: --trainer.default_root_dir"
            )
