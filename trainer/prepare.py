"""``trainer prepare``: fills the caches on a machine with a network, so that fit, validate and test need none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config_files import read_command


def prepare(args: Sequence[str]) -> int:
    """Fetches what ``trainer fit ARGS`` would fetch, tokenises it, and prints what lies where.

    Raises:
        ValueError: as fit, before it trains.
    """
    import torch

    from trainer.check.report import read_facts
    from trainer.data.files import is_hub_id
    from trainer.data.loading import load
    from trainer.data.retrieval import load_collections
    from trainer.data.tokens import tokenize
    from trainer.encoder import Encoder
    from trainer.encoder.folder import backbone_folder
    from trainer.lightning_cli import Parts

    parts = Parts(["fit", *args], read_command(args), execute=False)
    data = parts.datamodule
    for spec in parts.model.encoder_specs:
        Encoder(spec, parts.model.max_tokens)  # no list of files to keep: what loads here loads there
        folder = backbone_folder(spec)
        assert folder is not None
        _say("backbone", spec.backbone, "", folder)
    data.prepare_data()  # a damaged file of the cache is made again, as by fit
    for source in data.train_sources:
        if source.streaming:
            print(f"train      {source.path}: is read while it trains; nothing to prepare")
            continue
        table = tokenize(source, data.text_of(source), data.cache_dir)
        tokens = sum(int(table.lengths(column).sum()) for column in table.columns)
        _say("train", source.path, f"{table.num_rows:,} rows, {tokens:,} tokens", table.folder)
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts.model.open_teachers(data, device, verify=True)
    for number, teacher in data.teachers.items():
        _say("teacher", data.train_sources[number].path, f"{teacher.num_texts:,} embeddings", teacher.folder)
    if data.stream is None:
        read_facts(data)
    for source in data.validation_sources:
        if source.teacher is not None:
            Encoder(source.teacher, parts.model.max_tokens)
            teacher = backbone_folder(source.teacher)
            assert teacher is not None
            _say("teacher", source.teacher.backbone, "", teacher)
        if source.searches:
            for name, one in load_collections(source, data.cache_dir).items():
                count = f"{len(one.queries):,} queries, {len(one.documents):,} documents"
                print(f"{'validation':<10} {name}: {count}")
            continue
        rows = load(source, data.cache_dir)
        _say("validation", source.name, f"{len(rows):,} rows", Path(rows.cache_files[0]["filename"]).parent)
    if online := [source.path for source in data.train_sources if source.streaming and is_hub_id(source.path)]:
        print(f"{online[0]} is streamed from the hub: it needs the network while it trains")
        return 0
    print(
        "from here on, without a network: HF_HUB_OFFLINE=1 trainer fit (or sbatch slurm/train.sh) with the same flags"
    )
    return 0


def _say(part: str, name: str, count: str, folder: Path) -> None:
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{part:<10} {name}: {f'{count}, ' if count else ''}{num_bytes:,} bytes in {folder}")
