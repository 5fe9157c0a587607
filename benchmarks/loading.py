"""From files to batches: seconds to the first batch, tokens/s over an epoch, memory; beside sentence-transformers.

Both sides read the same rows with the same tokenizer and max_length. Ours tokenises them once and packs; theirs
tokenises and pads in the collator of its trainer. Tokens count without padding. Imports are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LABELS = {"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0, "not_entailment": 0.0}
COLUMNS = {"anchor": "premise", "positive": "hypothesis", "score": "label"}
MAX_LENGTH = 512


def write_encoder(data: Path, folder: Path) -> str:
    """A tiny BERT with the multilingual tokenizer: nothing here runs it, both sides load their tokenizer from it."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "mbert")
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def timed(into: dict[str, Any], name: str) -> Iterator[None]:
    """Wall seconds, and CPU seconds of this process and of children that have ended."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    yield
    into[f"{name}_s"] = round(time.perf_counter() - wall, 2)
    into[f"{name}_cpu_s"] = round(sum(os.times()[:4]) - cpu, 2)


def memory_mb() -> float:
    """RssAnon of this process and its children: what memory-mapped files do not explain."""
    import multiprocessing

    def rss_anon(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)

    pids = [os.getpid()] + [child.pid for child in multiprocessing.active_children() if child.pid]
    return round(sum(map(rss_anon, pids)) / 1000, 1)


def epoch(loader: Any, num_tokens: Callable[[Any], int], max_batches: int, batch_size: int) -> dict[str, Any]:
    """One pass over a loader. The rate leaves out the start of the workers: until each has given a batch."""
    result: dict[str, Any] = {}
    tokens = batches = counted = 0
    iterator = iter(loader)
    with timed(result, "first_batch"):
        next(iterator)
    batches += 1
    start, start_cpu = time.perf_counter(), time.process_time()
    warm_up = min(max_batches // 10, 4096 // batch_size + 8)
    for batch in iterator:
        batches += 1
        if batches == warm_up:
            start, start_cpu = time.perf_counter(), time.process_time()
        elif batches > warm_up:
            tokens, counted = tokens + num_tokens(batch), counted + 1
        if batches == max_batches // 2:
            result["rss_anon_mb"] = memory_mb()
        if batches == max_batches:
            break
    seconds = time.perf_counter() - start
    result |= {"batches": batches, "tokens": tokens, "seconds": round(seconds, 2)}
    result["tokens_per_s"] = round(tokens / seconds)
    result["main_process_us_per_batch"] = round((time.process_time() - start_cpu) / counted * 1e6, 1)
    return result


def measure_ours(data: Path, encoder: str, cache: Path, num_workers: int, batch_size: int) -> dict[str, Any]:
    from trainer.data.module import PairData
    from trainer.data.sources import Source
    from trainer.encoder import EncoderSpec

    source = Source(str(data / "nli/nli-300k.train.jsonl.gz"), COLUMNS, label_map=LABELS)
    spec = EncoderSpec(encoder, max_length=MAX_LENGTH)
    result: dict[str, Any] = {"side": "ours", "workers": num_workers, "batch_size": batch_size}
    result["cold"] = not cache.exists()
    module = PairData([source], spec, batch_size=batch_size, num_workers=num_workers, cache_dir=str(cache))
    with timed(result, "prepare"):
        module.prepare_data()
        module.setup("fit")
    module.trainer = SimpleNamespace(global_step=0, limit_train_batches=1.0)  # type: ignore[assignment]
    result |= epoch(module.train_dataloader(), lambda batch: batch.num_tokens, module.steps_per_epoch, batch_size)
    return result


def measure_theirs(data: Path, encoder: str, num_workers: int, batch_size: int, num_rows: int) -> dict[str, Any]:
    import gzip

    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    result: dict[str, Any] = {"side": "sentence-transformers", "workers": num_workers, "batch_size": batch_size}
    with timed(result, "prepare"), tempfile.TemporaryDirectory() as out:
        with gzip.open(data / "nli/nli-300k.train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(num_rows), strict=False)]
        table = [{k: LABELS[r[c]] if k == "score" else r[c] for k, c in COLUMNS.items()} for r in rows]
        model = SentenceTransformer(encoder, device="cpu")
        model.max_seq_length = MAX_LENGTH
        arguments = SentenceTransformerTrainingArguments(
            out, per_device_train_batch_size=batch_size, dataloader_num_workers=num_workers, report_to=[], use_cpu=True
        )
        trainer = SentenceTransformerTrainer(
            model, arguments, Dataset.from_list(table), loss=losses.CosineSimilarityLoss(model)
        )
        loader = trainer.get_train_dataloader()

    def num_tokens(batch: dict[str, Any]) -> int:
        return sum(int(mask.sum()) for name, mask in batch.items() if name.endswith("attention_mask"))

    return result | epoch(loader, num_tokens, len(loader), batch_size)


def measure_verify(cache: Path) -> dict[str, Any]:
    """What reading a table through sha256 costs at the start of a run."""
    from trainer.data.cache import damage, entries

    result: dict[str, Any] = {"side": "verify"}
    found = [entry for entry in entries(cache) if entry.kind == "tokens"]
    with timed(result, "verify"):
        faults = [damage(entry.folder) for entry in found]
    assert faults == [None]
    return result | {"mb": round(found[0].num_bytes / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("TRAINER_TEST_DATA"))
    parser.add_argument("--peer_rows", type=int, default=30_000, help="theirs is slow: it gets the first rows only")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or TRAINER_TEST_DATA must name the folder of data")
    from provenance import provenance

    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        results.append(result | {"load_average": os.getloadavg()[0]})
        print(json.dumps(results[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        encoder, cache = write_encoder(args.data, Path(folder) / "encoder"), Path(folder) / "cache"
        for _ in range(args.turns):
            for batch_size in (16, 1024):
                for num_workers in (0, 2):
                    add(measure_ours(args.data, encoder, cache, num_workers, batch_size))
        add(measure_verify(cache))
        for batch_size in (16, 1024):
            for num_workers in (0, 2):
                add(measure_theirs(args.data, encoder, num_workers, batch_size, args.peer_rows))


if __name__ == "__main__":
    main()
