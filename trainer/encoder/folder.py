"""Where the files of a backbone lie."""

from __future__ import annotations

from pathlib import Path

from trainer.encoder.spec import EncoderSpec


def backbone_folder(spec: EncoderSpec) -> Path | None:
    """The folder that was named, or its snapshot in the hub's cache; None where there is neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(spec.backbone).is_dir():
        return Path(spec.backbone)
    try:
        return Path(snapshot_download(spec.backbone, revision=spec.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
