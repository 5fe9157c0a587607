"""The documents hold together: links lead somewhere, messages that they quote are in the source, and the real parsers
take every command and every config that they show."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from trainer.check.rules import RULES, unfit_columns
from trainer.cli import COMMANDS, help_text, main
from trainer.compare.command import flags as compare_flags
from trainer.config_files import read_command
from trainer.data.files import FORMATS
from trainer.data.sources import Source
from trainer.lightning_cli import Parts
from trainer.mine.command import flags as mine_flags
from trainer.predict.command import flags as predict_flags

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md"), *ROOT.glob("benchmarks/*.md")],
)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue  # of other sites
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or not page.is_file() or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        left += [(page.parent / link).resolve() for link in links if ":" not in link]
    assert set(PAGES) - seen <= {ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"}


def test_quoted_messages_are_in_the_source() -> None:
    """A quotation with ... in it names parts of one message, in their order."""
    strings = []
    for file in ROOT.glob("trainer/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    strings += [screen.read_text(encoding="utf-8") for screen in ROOT.glob("trainer/help/*.txt")]
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quotes = [quote for quote in re.findall(r"`([^`\n]+)`", text) if " " in quote and "trainer " not in quote]
    quotes = [quote for quote in quotes if not re.match(r"[a-z_]+: \S+$", quote)]  # settings
    assert len(quotes) > 10
    for quote in quotes:
        pattern = re.compile(".*".join(map(re.escape, quote.split("..."))), flags=re.DOTALL)
        assert any(pattern.search(string) for string in strings), quote


# -- what pages list is all there is ----------------------------------------------------------------------


def _first_cells(page: str, heading: str) -> set[str]:
    """Names in the first column of the tables below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return {name for line in re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`(\w+)", line)}


def test_the_page_on_data_names_every_key_and_every_finding() -> None:
    keys = {key.name for key in fields(Source)} - {"path", "split", "subset", "revision", "max_negatives"}
    assert _first_cells("docs/data.md", "Keys of a source") == keys
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in ("path", "split", "subset", "revision", "max_negatives"))
    assert all(f"`{suffix}`" in text or f"{suffix.strip('.')}," in text.lower() for suffix in FORMATS)
    findings = {rule.__name__ for rule in RULES} | {unfit_columns.__name__}
    assert _first_cells("docs/data.md", "What the check names") == findings


def test_the_page_on_clusters_names_every_variable() -> None:
    head = (ROOT / "slurm/train.sh").read_text(encoding="utf-8").split("\nset -euo")[0]
    page = _first_cells("docs/cluster.md", "Before: a network, and your site")
    assert page == set(re.findall(r"^#   (TRAINER_\w+)", head, re.MULTILINE))


def test_metrics_that_pages_name_are_logged() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("trainer/**/*.py"))
    named = {name for page in PAGES for name in re.findall(r"`train/(\w+)`", page.read_text(encoding="utf-8"))}
    assert len(named) > 8
    assert [name for name in sorted(named) if not re.search(rf"[\"/]{name}\b", source)] == []


# -- commands and configs: parsed by the program itself ---------------------------------------------------

# Pages that a test of their own runs from top to bottom.
RUN = {
    "README.md": "tests/test_readme.py",
    "docs/comparing.md": "tests/compare/test_docs.py",
    "docs/embed-and-mine.md": "tests/test_embed_and_mine.py",
    "docs/extending.md": "tests/test_extending.py",
    "docs/getting-started.md": "tests/test_getting_started.py",
}
# Pages whose YAML or Python blocks one runs.
EXECUTED = {
    "docs/backbones.md": "tests/encoder/test_backbones.py",
    "docs/evaluators.md": "tests/evaluation/test_docs.py",
    "docs/losses.md": "tests/losses/test_document.py",
    "docs/publishing.md": "tests/export/test_onnx.py",
}
BASE = {
    "model": {"encoder": {"backbone": "somewhere"}, "loss": "InfoNCE"},
    "data": {"train": [{"path": "rows.jsonl", "columns": {"anchor": "a", "positive": "b"}}]},
    "trainer": {"accelerator": "cpu", "devices": 1},
}


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> Iterator[str]:
    """Of the bash blocks, and lines that are set in by four spaces."""
    for block in _blocks(page, "bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())
    yield from re.findall(r"^ {4}(trainer .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From which commands name this project's configs; the user's own hold BASE."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "benchmarks", "slurm", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def _build(args: list[str], command: str = "fit") -> None:
    """Parses as the program does, and builds model and data."""
    own = [i + 1 for i, word in enumerate(args) if word == "--config" and not Path(args[i + 1]).exists()]
    args = ["base.yaml" if i in own else word for i, word in enumerate(args)]
    Parts([command, *args], read_command(args), execute=False)


def _parse(words: list[str]) -> None:
    """The words behind `trainer`."""
    command, args = words[0], words[1:]
    assert command in COMMANDS, command
    if command in ("predict", "mine"):
        (predict_flags() if command == "predict" else mine_flags()).read(args)
    elif command == "compare":
        assert [word for word in compare_flags().parse_known_args(args)[1] if word.startswith("-")] == []
    elif command in ("export", "demo"):  # whose own parsers run what they have parsed
        known = help_text("export") if command == "export" else (ROOT / "trainer/demo.py").read_text(encoding="utf-8")
        assert [word for word in args if word.startswith("--") and word not in known] == []
    elif command == "cache":
        assert main(words) == 0
    else:
        _build(
            [word for word in args if word not in ("--exact", "--json", "--probe")],
            command if command in ("validate", "test") else "fit",
        )


def _parse_job(args: list[str]) -> None:
    """The words behind a script of slurm/: config files, then flags, or a command that takes none."""
    if args[0] in ("predict", "mine"):
        return _parse(args)
    configs = [word for word in args if word.endswith(".yaml")]
    flags = args[len(configs) :]
    for own in ("--seeds", "--overrides"):  # of slurm/sweep.sh
        if own in flags:
            del flags[flags.index(own) : flags.index(own) + 2]
    _build([word for config in configs for word in ("--config", config)] + flags)


def _understood(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    script = next((i for i, word in enumerate(words) if re.fullmatch(r"slurm/(train|sweep|debug)\.sh", word)), None)
    if script is not None:
        first = next(i for i in range(script + 1, len(words)) if words[i] in COMMANDS or words[i].endswith(".yaml"))
        _parse_job(words[first:])
    elif words[0] in ("trainer", ".venv/bin/trainer", "srun"):
        _parse(words[1 + next(i for i, word in enumerate(words) if word.endswith("trainer")) :])
    elif words[0] == "make":
        targets = Path("Makefile").read_text()
        assert [target for target in words[1:] if not re.search(rf"^{target}:", targets, re.MULTILINE)] == []
    elif words[0] in (".venv/bin/python", "python") and words[1].startswith("benchmarks/"):
        source = Path(words[1]).read_text()
        assert [word for word in words[2:] if word.startswith("--") and word not in source] == []
    elif words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"siamese-trainer\[(\w+)\]", command)
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert [extra for extra in extras if f"\n{extra} = [" not in project] == []
    else:
        others = ('eval "$(slurm/local-cluster.sh start)"', "slurm/local-cluster.sh stop", "hf auth login")
        assert any(shlex.split(command, comments=True) == shlex.split(other) for other in others), command


@pytest.mark.parametrize("page", [page for page in PAGES if any(_commands(page))], ids=_name)
def test_commands_are_understood(page: Path, folder: Path) -> None:
    if _name(page) in RUN:
        assert page.name in (ROOT / RUN[_name(page)]).read_text(encoding="utf-8")
        return
    for command in _commands(page):
        try:
            _understood(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{_name(page)}: {command}") from error


@pytest.mark.parametrize("command", [
    "trainer fit --config configs/stsb.yaml --data.batchsize 4",
    "trainer check --config configs/stsb.yaml --probes",
    "trainer predict --model m --data d --text t --out o --shards 3",
    "trainer compare runs --output x.html",
    "trainer export run out --formats onnx",
    "trainer cache list",
    "trainer tune --config configs/stsb.yaml",
    "sbatch slurm/train.sh configs/stsb.yaml --model.loss Info",
    "sbatch slurm/sweep.sh configs/stsb.yaml --seeds 1,2 --model.learning_rate fast",
    "make tests",
    ".venv/bin/python benchmarks/throughput.py --shapes stsb",
    "pip install 'siamese-trainer[gpu]'",
    "sentence-transformers train",
])  # fmt: skip
def test_a_wrong_command_is_found(command: str, folder: Path) -> None:
    with pytest.raises((Exception, SystemExit)):
        _understood(command)


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "yaml")], ids=_name)
def test_yaml_blocks_are_configs(page: Path, folder: Path) -> None:
    """Each of them, behind BASE, builds model and data."""
    if test := (RUN | EXECUTED).get(_name(page)):
        assert page.name in (ROOT / test).read_text(encoding="utf-8")
        return
    for number, block in enumerate(_blocks(page, "yaml")):
        path = folder / f"{number}.yaml"
        path.write_text(block)
        _build(["--config", "base.yaml", "--config", path.name])


def test_python_blocks_are_executed() -> None:
    shown = {_name(page) for page in PAGES if _blocks(page, "python")}
    run = RUN | EXECUTED
    assert shown <= run.keys() - {"docs/backbones.md"}
    assert [page for page in shown if Path(page).name not in (ROOT / run[page]).read_text(encoding="utf-8")] == []
