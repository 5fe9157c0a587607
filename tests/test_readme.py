"""Every command that the README shows is run: here on tiny data, by CI, or by the tests of the cluster."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.demo_data import write_pairs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
TRAINER = [command for command in COMMANDS if command.startswith(".venv/bin/trainer ")]
# start of a command -> the file that runs it, and what stands there
ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    'eval "$(slurm/local-cluster.sh start)"': ("tests/slurm/test_slurm.py", '"start"'),
    "slurm/local-cluster.sh stop": ("tests/slurm/test_slurm.py", '"stop"'),
    "sbatch --nodes 2 ": ("tests/slurm/test_slurm.py", "sbatch"),
    ".venv/bin/python benchmarks/": ("tests/slow/test_benchmarks.py", "README.md"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("readme"), num_train=48, num_dev=12, seed=3)


def test_every_command_is_run_somewhere() -> None:
    assert len(TRAINER) >= 2
    for command in COMMANDS:
        if command in TRAINER:
            continue
        found = [place for start, place in ELSEWHERE.items() if command.startswith(start)]
        assert found, f"nothing runs this command of the README: {command}"
        file, text = found[0]
        assert text in (ROOT / file).read_text(encoding="utf-8"), (file, text)


@pytest.mark.parametrize("command", TRAINER, ids=[" ".join(command.split()[1:4]) for command in TRAINER])
def test_trainer_command(command: str, data: tuple[Path, Path], tiny_encoder: Path, tmp_path: Path) -> None:
    """As written, with the README's files replaced by tiny ones and a few steps. A process of its own, because the
    check starts its second rank as a copy of the command line."""
    train, dev = data
    words = [
        {"pairs.jsonl.gz": str(train), "dev.jsonl.gz": str(dev)}.get(word, word) for word in shlex.split(command)[1:]
    ]
    tiny = {
        "model.encoder.backbone": tiny_encoder,
        "model.encoder.max_length": 32,
        "data.train.path": train,
        "data.validation.path": dev,
        "data.train.score_range": "[0, 5]",
        "data.validation.score_range": "[0, 5]",
        "tracking.wandb": "off",
        "trainer.max_steps": 4,
        "trainer.default_root_dir": tmp_path / "run",
    }
    for key, value in tiny.items():
        if f"--{key}" not in words:
            words += [f"--{key}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    if words[0] == "check" and "--exact" not in words:
        assert "\n0 errors, " in done.stdout
    elif words[0] == "check":
        assert "exact: pass" in done.stdout
        assert "FAIL" not in done.stdout
    else:
        assert (tmp_path / "run" / "model" / "modules.json").exists()
