"""The report as text for people: whole for `trainer check`, short for the start of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trainer.check.finding import Finding
from trainer.check.report import Plan, Report
from trainer.data.facts import SourceFacts
from trainer.data.leaks import LeakFacts

WIDTH = 100
_BARS = " ▁▂▃▄▅▆▇█"
_LABELS = {"error": ("ERROR", "bold red"), "allowed": ("ALLOWED", "bold magenta"), "warning": ("WARNING", "yellow")}
_STEPS_PER_S = 10


def print_report(report: Report, measured: str = "") -> None:
    """The whole report; no colours and WIDTH columns where stdout is not a terminal.

    Args:
        measured: what a probe found.
    """
    console = Console()
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    console.print(Group(*_blocks(report, measured)), highlight=False)


def short_lines(report: Report) -> Iterator[str]:
    """A line for each source and validation set, and one for each finding that does not stop the run."""
    for path, facts in zip(report.paths, report.sources, strict=True):
        parts = [f"{facts.num_rows:,} rows"]
        for column in facts.columns:
            parts.append(f"{column.name} {column.min} to {column.max} pieces ({_scripts(column.scripts, 2)})")
        yield f"data: {path}: {' · '.join(parts + _targets(facts))}"
    for leak in report.leaks:
        yield f"data: validation {leak.name}: {_leak(leak)}"
    for finding in report.warnings:
        yield f"{_kind(finding)}: {finding.name}: {finding}"


def refusal(report: Report) -> str:
    """Why a fit does not start; empty where nothing stops it."""
    if not report.errors:
        return ""
    lines = ["the data does not suit this run"]
    for finding in report.errors:
        lines.append(f"  {finding.name}: {finding}")
        lines += [f"      {line}" for line in finding.recipe.splitlines()]
    names = dict.fromkeys(finding.name for finding in report.errors if finding.name != "unfit_columns")
    run_anyway = f" · run it all the same: --check.allow {','.join(names)}" if names else ""
    return "\n".join([*lines, f"  the whole report: trainer check with the same flags{run_anyway}"])


# -- parts of the whole report ----------------------------------------------------------------------------


def _blocks(report: Report, measured: str) -> Iterator[RenderableType]:
    yield Rule(Text.assemble((report.loss, "bold"), f" on {report.backbone}"), align="left", characters="─")
    for path, facts in zip(report.paths, report.sources, strict=True):
        yield Text()
        yield _source(path, facts)
    for leak in report.leaks:
        yield Text()
        yield Text.assemble(("validation ", "bold cyan"), (leak.name, "bold"), f"  {_leak(leak)}")
    yield Text()
    yield _run(report, measured)
    yield Text()
    for finding in report.findings:
        yield _finding(finding)
    yield _verdict(report)


def _source(path: str, facts: SourceFacts) -> Group:
    looked = f", {facts.num_looked_at:,} of them looked at" if facts.num_looked_at < facts.num_rows else ""
    skipped = f", {facts.num_skipped:,} bad ones left out" if facts.num_skipped else ""
    head = Text.assemble(("train ", "bold cyan"), (path, "bold"), f"  {facts.num_rows:,} rows{skipped}{looked}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("pieces of a text", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    for name in ("min", "median", "p95", "max", "cut", "unknown", "distinct"):
        table.add_column(name, justify="right")
    table.add_column("scripts", overflow="fold")
    for column in facts.columns:
        table.add_row(
            column.name,
            _bars(column.histogram),
            *(f"{n:,}" for n in (column.min, column.median, column.p95, column.max)),
            f"{column.num_truncated / max(1, column.num_texts):.1%}",
            f"{column.unknown_share:.1%}",
            f"{column.num_distinct:,}",
            _scripts(column.scripts, 3),
        )
    lines: list[RenderableType] = [head, Padding(table, (0, 0, 0, 2))]
    notes = _targets(facts)
    if facts.num_duplicates:
        notes.append(f"{facts.num_duplicates:,} rows say the same as another")
    lines += [Padding(Text(note), (0, 0, 0, 2)) for note in notes]
    return Group(*lines)


def _bars(counts: Sequence[int]) -> str:
    most = max(1, *counts)
    # A bin that holds anything at all shows.
    return "".join(_BARS[max(1, round(8 * count / most))] if count else " " for count in counts)


def _scripts(scripts: dict[str, float], count: int) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(scripts.items())[:count]) or "no letters"


def _targets(facts: SourceFacts) -> list[str]:
    found = []
    if (scores := facts.scores) is not None:
        if scores.counts and len(scores.counts) <= 6:
            told = ", ".join(f"{value} ({count:,} rows)" for value, count in scores.counts.items())
            found.append(f"scores {told}")
        else:
            quartiles = ", ".join(f"{q:.3g}" for q in scores.quartiles)
            found.append(f"scores {scores.min:.3g} to {scores.max:.3g}, quartiles {quartiles}")
    elif (margins := facts.margins) is not None:
        found.append(f"margins of the teacher {margins.min:.3g} to {margins.max:.3g}")
    if (labels := facts.labels) is not None:
        told = f"{labels.num_classes:,} of {labels.smallest:,} to {labels.largest:,} rows"
        if labels.counts and len(labels.counts) <= 6:
            told = ", ".join(f"{label} ({count:,} rows)" for label, count in labels.counts.items())
        found.append(f"classes {told}")
    return found


def _leak(leak: LeakFacts) -> str:
    if leak.num_known_rows is None:
        return f"{leak.num_rows:,} {leak.unit}; not looked for in training, which is streamed"
    share = leak.num_known_rows / leak.num_rows
    streamed = f"; {leak.num_unsearched} of its sources not looked at: streamed" if leak.num_unsearched else ""
    return (
        f"{leak.num_rows:,} {leak.unit}; {leak.num_known_rows:,} of them ({share:.1%}) and "
        f"{leak.num_known_texts:,} of {leak.num_texts:,} texts stand in training{streamed}"
    )


def _run(report: Report, measured: str) -> Table:
    plan = report.plan
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, text in _plan_lines(plan):
        table.add_row(name, text)
    if (memory := report.memory) is not None:
        parts = f"weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, "
        parts += f"optimizer {_gib(memory.optimizer)}, activations {_gib(memory.activations)}"
        table.add_row("memory", f"about {_gib(memory.total)} GiB a device: {parts}")
        trained = f"{memory.num_trained / 1e6:,.1f} M of {memory.num_parameters / 1e6:,.1f} M parameters are trained"
        table.add_row("", f"{trained}; forwards of {memory.num_tokens:,} tokens")
    if measured:
        table.add_row("measured", measured)
    return table


def _plan_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    ranks = f"{plan.num_ranks} rank{'s' * (plan.num_ranks > 1)}"
    epochs = f"{plan.epochs:.3g} epoch{'s' * (plan.epochs != 1)}"
    yield (
        "steps",
        f"{plan.num_steps:,} of {plan.batch_size:,} rows on {ranks}: {epochs} of {plan.steps_per_epoch:,} steps",
    )
    known = [negatives for negatives in plan.num_negatives if negatives is not None]
    if known:
        yield "negatives", f"{' and '.join(f'{n:,}' for n in dict.fromkeys(known))} for each query"
    if any(plan.false_negatives):
        told = " and ".join(f"{share:.3g}" for share in plan.false_negatives if share is not None)
        yield "", f"{told} of them right answers, for their texts stand in several rows"
    if any(plan.num_left_out):
        yield "left out", f"{sum(plan.num_left_out):,} rows of an epoch that no batch can hold"
    tokens = plan.tokens_per_step
    yield (
        "tokens",
        f"{tokens:,.0f} a step, at most {plan.max_tokens_per_step:,}: {_STEPS_PER_S} steps/s need "
        f"{_STEPS_PER_S * tokens:,.0f} tokens/s of the loader",
    )
    yield "padding", f"{plan.padding_efficiency:.0%} of a padded batch is text, 100% of a packed one"
    if plan.num_used_pieces is not None:
        share = plan.num_used_pieces / plan.num_pieces
        yield "vocabulary", f"{plan.num_used_pieces:,} of {plan.num_pieces:,} pieces are used ({share:.0%})"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _kind(finding: Finding) -> str:
    return "allowed" if finding.allowed else finding.severity


def _finding(finding: Finding) -> RenderableType:
    label, style = _LABELS[_kind(finding)]
    head = Text.assemble((f"{label:<8}", style), (finding.name, "bold"), f"  {finding.where}" if finding.where else "")
    body: list[Any] = [Text(finding.cause), Text.assemble(("→ ", "green"), finding.remedy)]
    if finding.recipe:
        body.append(Padding(Text(finding.recipe, style="green"), (0, 0, 0, 2)))
    return Group(head, Padding(Group(*body), (0, 0, 1, 8), expand=False))


def _verdict(report: Report) -> Text:
    errors, warnings = len(report.errors), len(report.warnings)
    text = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    return Text(text, style="bold red" if errors else "bold green")
