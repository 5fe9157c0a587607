"""Makes progress.svg: what `trainer fit` shows in a terminal, of a real run with the demo's data on this machine.

python docs/images/progress.py
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.text import Text

from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder

OUT = Path(__file__).with_name("progress.svg")
COMMAND = "trainer fit --config pairs.yaml"
WIDTH = 116
SHOWN_AT = 0.7  # of the steps
COLUMNS = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}


def write_recipe(folder: Path) -> None:
    train, dev = write_pairs(folder, num_train=3200, num_dev=200, seed=1)
    texts = [text for pair in read_pairs(train) for text in (pair.sentence1, pair.sentence2)]
    write_encoder(folder / "encoder", texts, hidden=96, layers=2, heads=4)
    source = {"columns": COLUMNS, "score_range": [0, 5]}
    recipe = {
        "model": {"encoder": {"backbone": "encoder"}, "loss": "CosineSimilarity", "learning_rate": 1e-3},
        "data": {
            "train": [{"path": train.name, **source}],
            "validation": [{"name": "dev", "path": dev.name, **source}],
            "batch_size": 32,
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 25},
        "tracking": {"wandb": "off"},
    }
    (folder / "pairs.yaml").write_text(yaml.safe_dump(recipe))


def screens(output: str) -> list[list[str]]:
    """The lines of the terminal whenever something is about to be drawn anew; of its controls those that rich uses."""
    lines, row, found = [""], 0, []
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b", output):
        if piece == "\n":
            row += 1
            lines += [""] * (row >= len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            found.append(list(lines))
            lines[row] = ""
        elif piece.endswith("m") or piece[0] not in "\x1b\r":
            lines[row] += piece
    return found


def run(folder: Path) -> str:
    """Everything that the command writes to a terminal of WIDTH columns."""
    environ = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "40", "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    main, other = pty.openpty()
    program = [sys.executable, "-m", *COMMAND.split()]
    process = subprocess.Popen(program, cwd=folder, env=environ, stdout=other, stderr=other)
    os.close(other)
    parts = []
    try:
        while part := os.read(main, 65536):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0, b"".join(parts).decode()
    return b"".join(parts).decode()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder)
        drawn = screens(run(folder))
    for lines in drawn:
        done = re.search(r"(\d+)/(\d+) .*eta", lines[-3]) if len(lines) > 3 and "eval/" in lines[-1] else None
        if done and int(done[1]) >= SHOWN_AT * int(done[2]):
            break
    first = next(i for i, line in enumerate(lines) if "parameters" in line)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), COMMAND))
    for line in lines[first:]:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    console.print()  # or other fonts than rich's lose the foot of the last line
    picture = console.export_svg(title="siamese-trainer")
    OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")  # no network
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
