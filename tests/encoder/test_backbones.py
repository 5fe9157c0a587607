"""docs/backbones.md says what the code does."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from trainer.data.module import PairData
from trainer.encoder.encoder import PACKED_MODEL_TYPES
from trainer.module import EmbeddingModule

PAGE = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_names_what_runs_packed() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    packed = {name for row in rows if row[3].strip() == "packed" for name in re.findall("`(.*?)`", row[1])}
    assert packed == PACKED_MODEL_TYPES
    assert all(row[3].strip() == "packed" for row in rows)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_a_config(block: str) -> None:
    """Each key and type is one that the parser takes, and each value reaches its object."""
    said: dict[str, Any] = yaml.safe_load(block)
    encoder = {"backbone": "somewhere", **said.get("model", {}).get("encoder", {})}
    data = {"train": [{"path": "rows.jsonl", "columns": {"anchor": "a", "positive": "b"}}], **said.get("data", {})}
    config = {"model": {"loss": "InfoNCE", **said.get("model", {}), "encoder": encoder}, "data": data}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EmbeddingModule, "model")
    parser.add_class_arguments(PairData, "data")
    config["data"]["encoder"] = encoder
    built = parser.instantiate_classes(parser.parse_object(deepcopy(config)))
    for key, value in encoder.items():
        found = getattr(built.model.encoder_spec, key)
        assert (vars(found) if key == "lora" else found) == value
    for key, value in said.get("model", {}).get("document_encoder", {}).items():
        assert getattr(built.model.document_spec, key) == value
    for key, value in data["train"][0].items():
        assert getattr(built.data.train_sources[0], key) == value


def test_all_blocks_were_found() -> None:
    assert len(BLOCKS) == PAGE.count("```yaml") == 6
