"""Who may import whom: read from the source with ast, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "trainer").rglob("*.py"))
}
# 4 the roof, 3 Lightning, 2 pure things, 1 the ground. A folder's __init__ stands on the floor of its files.
FLOORS = {
    4: """trainer.__main__ trainer.cli trainer.lightning_cli trainer.help_text trainer.run_dir trainer.run_lock
          trainer.third_party
          trainer.checkpoint_path trainer.preflight trainer.prepare trainer.config_errors trainer.config_files
          trainer.config_classes trainer.config_migration trainer.config_values
          trainer.cache_command trainer.check.command trainer.compare trainer.compare.*
          trainer.demo trainer.demo_data trainer.demo_encoder
          trainer.export trainer.export.* trainer.mine.columns trainer.mine.command trainer.predict.command
          trainer.predict.flags trainer.trainer_refusals""",
    3: """trainer.module trainer.checkpoint trainer.data.module trainer.data.steps trainer.evaluation.runner
          trainer.evaluation.scoring trainer.evaluation.sharded
          trainer.check.callback trainer.check.probe trainer.check.render trainer.check.report
          trainer.distributed.exact trainer.distributed.heartbeat
          trainer.distributed.launch trainer.distributed.meeting trainer.distributed.preemption
          trainer.distributed.shared_work trainer.distributed.strategies trainer.distributed.watch
          trainer.finite trainer.memory
          trainer.mine.search trainer.mine.write trainer.predict.embed trainer.tracking trainer.tracking.*""",
    2: """trainer.base_weights trainer.identity trainer.manifest trainer.model_refusals trainer.optimizer
          trainer.losses trainer.losses.* trainer.encoder trainer.encoder.*
          trainer.check trainer.check.batches trainer.check.finding trainer.check.labels trainer.check.memory
          trainer.check.rules trainer.check.texts trainer.data.batches trainer.data.blocks
          trainer.data.bylabel trainer.data.cache trainer.data.checks trainer.data.collate trainer.data.columns
          trainer.data.delimited trainer.data.derived trainer.data.distinct trainer.data.evalsource
          trainer.data.columnfacts trainer.data.facts trainer.data.files
          trainer.data.hashes trainer.data.json_lines trainer.data.layouts trainer.data.leaks trainer.data.loading
          trainer.data.opaque trainer.data.order trainer.data.parts trainer.data.permutation trainer.data.progress
          trainer.data.refusals trainer.data.retrieval trainer.data.rowgroups trainer.data.rows trainer.data.sources
          trainer.data.streaming trainer.data.streamrows trainer.data.table trainer.data.teacher trainer.data.teaching
          trainer.data.tokens trainer.data.validation trainer.data.values trainer.data.workers
          trainer.evaluation trainer.evaluation.base trainer.evaluation.binaryclassification
          trainer.evaluation.classification trainer.evaluation.health trainer.evaluation.informationretrieval
          trainer.evaluation.labelaccuracy trainer.evaluation.labelretrieval trainer.evaluation.mse
          trainer.evaluation.reranking trainer.evaluation.search trainer.evaluation.sts
          trainer.evaluation.topk trainer.evaluation.translation trainer.evaluation.triplet
          trainer.mine trainer.mine.pairs trainer.mine.select trainer.predict trainer.predict.ids
          trainer.predict.shards""",
    1: """trainer trainer.batch trainer.data trainer.distributed trainer.distributed.gather
          trainer.files trainer.host_memory trainer.interruption trainer.messages trainer.output""",
}


def floor_of(module: str) -> int:
    floors = [floor for floor, names in FLOORS.items() if any(fnmatch(module, name) for name in names.split())]
    assert len(floors) == 1, f"{module} stands on {floors or 'no floor'}: give it one in FLOORS"
    return floors[0]


def _imports(nodes: list[ast.stmt], deep: bool) -> set[str]:
    """Modules that the statements import, by full name; ``deep`` looks into functions and conditions too."""
    found = set()
    for node in [n for statement in nodes for n in ast.walk(statement)] if deep else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            assert node.module is not None
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            # ``from trainer.distributed import gather`` imports trainer.distributed.gather
            found |= {name if name in MODULES else node.module for name in members}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS = {name: _imports(tree.body, deep=True) for name, tree in TREES.items()}


def _importers(*packages: str) -> set[str]:
    """Modules of ours that import one of the packages."""
    return {
        module
        for module, imported in IMPORTS.items()
        if any(name == package or name.startswith(f"{package}.") for name in imported for package in packages)
    }


def _under(*folders: str) -> set[str]:
    return {name for name in MODULES if any(name == f or name.startswith(f"{f}.") for f in folders)}


def test_every_module_has_one_floor_and_no_name_is_left_over() -> None:
    assert len(MODULES) > 30
    for module in MODULES:
        floor_of(module)
    listed = {name for names in FLOORS.values() for name in names.split()}
    assert {name for name in listed if not any(fnmatch(module, name) for module in MODULES)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    ours = {name for name in IMPORTS[module] if name == "trainer" or name.startswith("trainer.")}
    assert ours <= MODULES.keys(), "an import of a module that is not there"
    upwards = {name for name in ours if floor_of(name) > floor_of(module)}
    assert not upwards, f"floor {floor_of(module)} imports from above: {upwards}"
    assert "trainer" not in ours, "write `from trainer.x import y`; hooks have an argument named trainer"


def test_no_module_imports_itself_through_others() -> None:
    at_import = {name: _imports(tree.body, deep=False) & MODULES.keys() for name, tree in TREES.items()}
    graphlib.TopologicalSorter(at_import).prepare()  # raises CycleError


def test_each_library_has_its_place() -> None:
    assert _importers("torch.distributed") <= _under("trainer.distributed")
    assert "trainer.distributed.gather" in _importers("torch.distributed")
    assert _importers("wandb") <= _under("trainer.tracking")
    strategies = {name for name in MODULES if name.startswith("trainer.distributed.strategies")}
    assert _importers("deepspeed") <= strategies


def test_the_pure_things_do_not_know_each_other() -> None:
    losses, encoder = _under("trainer.losses"), _under("trainer.encoder")
    evaluators = {name for name in _under("trainer.evaluation") if floor_of(name) == 2}
    assert not losses & _importers("transformers", "sentence_transformers", "lightning", "trainer.encoder")
    assert not losses & _importers("trainer.data", "trainer.evaluation")
    assert not encoder & _importers("trainer.losses", "trainer.data", "trainer.evaluation", "lightning")
    assert not evaluators & _importers("trainer.distributed", "trainer.tracking", "trainer.data", "lightning")
    assert not {name for name in MODULES if floor_of(name) < 3} & _importers("lightning")


def test_no_file_for_odds_and_ends() -> None:
    stems = {part for name in MODULES for part in name.split(".")}
    assert not stems & {"utils", "util", "common", "helpers", "helper", "misc"}


PROBE = """
import logging, os, sys
import datasets, lightning.pytorch, sentence_transformers, torch  # what these set in the environment is theirs
environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
state = torch.get_rng_state()
for name in {modules!r}:
    __import__(name)
heavy = {{"wandb", "deepspeed"}} & sys.modules.keys()
assert not heavy, f"imported: {{heavy}}"
assert not torch.cuda.is_initialized(), "an import started CUDA"
assert torch.equal(state, torch.get_rng_state()), "an import drew random numbers"
assert logging.getLogger().handlers == handlers, "an import set up logging"
changed = set(environment.items()) ^ set(os.environ.items())
assert not changed, f"an import changed the environment: {{changed}}"
"""


def test_imports_have_no_side_effects() -> None:
    """On environment, logging, random numbers, CUDA; a fresh process, for here the modules are imported."""
    code = PROBE.format(modules=[name for name in MODULES if name != "trainer.__main__"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
