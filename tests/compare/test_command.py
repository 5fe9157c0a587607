"""The command line: the tables, the report, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.compare.made_runs import EVAL, best_of, make_run, make_runs
from tests.other_user import open_folder, without_permissions
from trainer.cli import main
from trainer.compare.command import read_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "runs"
    make_runs(folder)
    return folder


def test_tables_and_report_of_three_recipes_and_three_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs.parent / "report.html"
    assert main(["compare", *map(str, sorted(runs.glob("*/*"))), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("9 runs in 3 groups\n")
    assert re.search(r"^model\.loss +CoSENT +CosineSimilarity +InfoNCE$", printed, re.M)
    assert re.search(r"^seeds( +3 \(1, 2, 3\)){3}$", printed, re.M)
    assert re.search(r"^rows/s( +\d{3} ± \d+){3}$", printed, re.M)
    best = [best_of(runs / "cosent" / f"seed={seed}", "eval/dev/spearman_cosine") for seed in (1, 2, 3)]
    assert f"{sum(best) / 3:.4f} ± " in printed
    assert "model.encoder" not in printed
    assert "cache_dir" not in printed
    page = out.read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    assert printed.endswith(f"report: {out}\n")
    assert f"<b>{sum(best) / 3:.4f}" in page.replace("<td class=best>", "<b>")


def test_notes_stand_above_the_tables_and_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a/seed=1", 300), ("a/seed=1_job=2", 300), ("a/seed=2", 100)):
        make_run(tmp_path / name, seed=2 if name == "a/seed=2" else 1, steps=steps)
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    first, steps_note, seed_note, *_ = capsys.readouterr().out.splitlines()
    assert first == "3 runs in 1 group"
    assert re.match(r"note: \S+: its runs stand at different steps, \S+seed=2 at 100 and \S+ at 300; ", steps_note)
    assert re.match(r"note: \S+: seed 1 stands 2 times \(", seed_note)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for note in (steps_note, seed_note):
        assert note.removeprefix("note: ") in page


class Page(HTMLParser):
    """What a page would fetch, its text and whether every element is closed."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # of SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def test_the_report_is_whole_and_fetches_nothing(runs: Path) -> None:
    out = runs.parent / "whole.html"
    assert main(["compare", str(runs), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [one for one in page.fetched if not one.startswith("data:")] == []
    assert not re.search(r"url\(|@import|fetch\(", text)
    assert "<!--" not in text.split("<body>")[1], "a part of the page was not filled in"
    assert text.count('<svg class="plot curves"') > 20
    for title in ("Results", "Curves", "Config", "Evaluations", "Embedding health", "Cost", "Runs"):
        assert f"<h2>{title}</h2>" in text
    for name in EVAL:
        assert f"{name} ↑</th>" in text


def test_a_page_does_not_grow_with_its_runs(tmp_path: Path) -> None:
    """Lines have 150 points at most; here those of the evaluations come near it."""
    sizes = []
    for steps in (750, 3000):
        folder = make_run(tmp_path / f"{steps}", steps=steps)
        assert main(["compare", str(folder), "--out", str(tmp_path / "r.html")]) == 0
        sizes.append((tmp_path / "r.html").stat().st_size)
    assert sizes[1] < 1.5 * sizes[0], "four times the rows"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def console(page: Path) -> list[str]:
    """What a browser without a network says of a page."""
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'browser'}", "--dump-dom"]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    assert "</html>" in done.stdout
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow  # nine runs of 3,600 rows: most of it is making them
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium and no google-chrome")
def test_long_runs_open_in_a_browser_without_a_network(tmp_path: Path) -> None:
    """Three recipes with three seeds, 3,600 rows each: below 2 MB, and nothing is complained of."""
    for recipe in ("cosine", "cosent", "infonce"):
        for seed in (1, 2, 3):
            make_run(tmp_path / "runs" / recipe / f"seed={seed}", recipe, seed, steps=15_000)
    page = tmp_path / "report.html"
    assert main(["compare", str(tmp_path / "runs"), "--out", str(page)]) == 0
    assert page.stat().st_size < 2_000_000
    assert console(page) == []
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>nothing.here()</script><img src='https://example.com/x.png'>")
    assert len(console(wrong)) == 1, "the browser keeps what it has to say to itself"


def test_what_a_run_says_cannot_break_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<script>alert(1)</script>" / "seed=1")
    text = (folder / "config.yaml").read_text().replace("all-MiniLM-L6-v2", "<img src=x onerror=alert(1)>")
    (folder / "config.yaml").write_text(text)
    other = make_run(tmp_path / "other" / "seed=1")
    assert main(["compare", str(folder), str(other), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img" not in page


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 305, "train/lo')
    assert main(["compare", str(folder)]) == 0


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: [1"), ("run.json", "\n{"), ("run.json", "[1]")])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    assert main(["compare", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run / name} can't be read: ")
    assert "leave this run out" in said


def test_a_run_that_has_only_just_begun_is_left_out_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    assert main(["compare", str(tmp_path)]) == 1
    assert "has metrics yet; wait for their first log" in capsys.readouterr().err
    make_run(tmp_path / "c")
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1 run in 1 group")
    assert printed.err.count("holds no metrics yet: metrics.jsonl is empty; leave it out, or wait for its steps") == 2


def test_a_folder_names_the_runs_at_all_its_depths(tmp_path: Path) -> None:
    """A copy of a run inside a run is no second one."""
    for place in ("a", "stsb/seed=1", "a/copy", "one/two/three/four"):
        make_run(tmp_path / place, steps=10)
    make_run(tmp_path / "stsb/lr/seed=3", steps=10)
    names = [Path(run.name).relative_to(tmp_path).as_posix() for run in read_runs([str(tmp_path)])]
    assert names == ["a", "stsb/seed=1", "stsb/lr/seed=3"]
    assert [run.name for run in read_runs([str(tmp_path / "a")])] == [str(tmp_path / "a")]


def test_one_run_and_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One alone has no differences; a dozen stand in blocks of five columns."""
    one = make_run(tmp_path / "one")
    assert main(["compare", str(one), "--out", str(tmp_path / "one.html")]) == 0
    assert capsys.readouterr().out.startswith("1 run in 1 group\nmetrics")
    for number in range(11):
        folder = make_run(tmp_path / f"rate{number}x")
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("learning_rate: 0.001", f"learning_rate: {number + 1}.0e-05"))
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "many.html")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("12 runs in 12 groups")
    assert len(re.findall(r"^model\.learning_rate ", printed, re.M)) == 3


def test_a_run_of_another_user_is_not_said_to_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with open_folder() as folder:
        run = folder / "run"
        run.mkdir(mode=0)
        with without_permissions():
            assert main(["compare", str(run)]) == 1
    assert f"error: {run}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 2, "runs are needed: trainer compare RUN [RUN...] [--out report.html]"),
        (["x", "--output", "y"], 2, "'--output' is no flag of trainer compare; see trainer compare --help"),
        (["x", "--out"], 2, "--out: expected one argument; see trainer compare --help"),
        (["x", "--out", "y.pdf"], 2, "--out y.pdf: the report is a page; give it a name that ends in .html"),
        (["nothing"], 1, "there is no run nothing: name a run directory, a folder of them, or an offline W&B folder"),
        (["empty"], 1, "empty holds no run: neither metrics.jsonl nor an offline-run-* of W&B"),
        (["young"], 1, "young holds no metrics yet: metrics.jsonl is empty; leave it out, or wait for its steps"),
        (["damaged"], 1, "damaged holds no metrics yet: metrics.jsonl is empty; leave it out, or wait for its steps"),
        (["wandb:x"], 1, "wandb:x: write wandb:entity/project or wandb:entity/project/group"),
    ],
)
def test_refused(
    words: list[str], status: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("young").mkdir()
    Path("young/metrics.jsonl").touch()
    Path("damaged").mkdir()
    Path("damaged/metrics.jsonl").write_bytes(b'{"train/loss": 1.0}\n{"step": 1, "train/loss": 1.0\n{"step": "\xff"}\n')
    assert main(["compare", *words]) == status
    assert text in capsys.readouterr().err
