"""The model card: what only we know of a run, filled into sentence-transformers' own card.

sentence-transformers renders the card; `complete_readme` adds the few lines its template has no place for.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from textwrap import indent
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.util import fullname

from trainer.data.evalsource import EvalSource
from trainer.data.files import is_hub_id
from trainer.data.loading import load
from trainer.data.order import Order
from trainer.data.parts import Permutation
from trainer.data.retrieval import load_collections
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.encoder.folder import public_name
from trainer.export.account import against_base, config_block, cost, data_account
from trainer.export.curves import FILE as CURVES_FILE
from trainer.export.record import Run, evaluations, hyperparameters, non_default, training_logs
from trainer.losses import Loss

logger = logging.getLogger(__name__)

DISTRIBUTION = "siamese-trainer"
_UNKNOWN_BASE = "<!-- - **Base model:** [Unknown](https://huggingface.co/unknown) -->"
_EVALUATION_HEADING = "\n## Evaluation\n"
_TRAINING_HEADING = "\n## Training Details\n"
_VERSIONS_HEADING = "\n### Framework Versions\n"


def fill_card(model: SentenceTransformer, run: Run) -> None:
    """Fill ``model.model_card_data``; the next ``save_pretrained`` renders it.

    The network is asked for nothing but rows of hub data sets that are not cached.
    """
    card = model.model_card_data
    card.local_files_only = True  # no hub look-up of names that merely look like hub ids
    # Without this tag sentence-transformers would copy the card of the backbone.
    card.add_tags(["generated_from_trainer", DISTRIBUTION])
    card.version.setdefault("accelerate", "not installed")
    _set_base(card, run.module.encoder_specs)
    train = [_read(source, run.data.cache_dir) for source in run.data.train_sources]
    validation = [_read(source, run.data.cache_dir) for source in run.data.validation_sources]
    if run.data.max_rows:
        train = [rows and rows.select(range(min(len(rows), run.data.max_rows))) for rows in train]
    has_towers = run.module.document_spec is not None
    card.train_datasets = [
        _dataset_entry(card, source, rows, loss, loss.describe(), has_towers)
        for source, rows in zip(run.data.train_sources, train, strict=True)
        for loss in [run.module.loss_of(source)]
    ]
    card.eval_datasets = [
        _dataset_entry(card, source, rows, source.evaluator, vars(source.evaluator), has_towers)
        for source, rows in zip(run.data.validation_sources, validation, strict=True)
    ]
    card.datasets = sorted({entry["id"] for entry in card.train_datasets if "id" in entry})
    sizes = tuple(len(rows) for rows in train if rows)
    if sizes:
        card.add_tags(f"dataset_size:{sum(sizes)}")
    _set_citations(card, list(dict.fromkeys(run.module.loss_of(source) for source in run.data.train_sources)))
    card.all_hyperparameters = hyperparameters(run)
    card.non_default_hyperparameters = non_default(card.all_hyperparameters)
    all_known = len(sizes) == len(train)
    parts, mixing = [Permutation(size) for size in sizes], run.data.mixing
    weights = tuple(source.weight for source in run.data.train_sources)
    order = Order(parts, run.data.batch_size, run.data.seed, mixing, weights) if all_known else None
    steps_per_epoch = order.steps_per_epoch if order else None
    card.training_logs = training_logs(run.log, run.data.validation_sources, steps_per_epoch)
    card.set_best_model_step(run.step)
    card.eval_results_dict = evaluations(run)
    _set_examples(card, [rows for rows in [*validation, *train] if rows])


def complete_readme(path: Path, run: Run, has_curves: bool = False) -> None:
    """Add to a rendered card which checkpoint this is, the account of its run, our versions, and a local base model.

    Args:
        has_curves: whether training.svg lies beside it.
    """
    specs = run.module.encoder_specs
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {public_name(specs)}\n"
    base = f"- **Base model:** `{public_name(specs)}` (a local folder)"
    if len(specs) > 1:
        base = f"- **Base models:** `{public_name(specs[:1])}` for queries, `{public_name(specs[1:])}` for documents"
    text = text.replace(_UNKNOWN_BASE, base)
    for source in run.data.validation_sources:
        # The template calls whatever belongs to a data set its loss.
        code = f"<code>{fullname(source.evaluator)}</code>"
        text = text.replace(f"* Loss: {code}", f"* Evaluator: {code}")
    chosen = f"\n### Exported Checkpoint\n\n`{run.checkpoint}`, step {run.step:,}: {run.reason}.\n"
    versions = f"- Lightning: {_version('lightning')}\n- {DISTRIBUTION}: {_version(DISTRIBUTION)}\n"
    for heading in (_TRAINING_HEADING, _VERSIONS_HEADING):
        text += "" if heading in text else heading
    gain = against_base(run)
    if gain and _EVALUATION_HEADING not in text:  # the exported step itself was not evaluated
        gain = _EVALUATION_HEADING + gain
    text = text.replace(_TRAINING_HEADING, gain + _TRAINING_HEADING, 1)
    curves = f"\n![Training loss and main metrics over the steps]({CURVES_FILE})\n" if has_curves else ""
    account = curves + chosen + data_account(run) + config_block(run) + cost(run)
    text = text.replace(_VERSIONS_HEADING, account + _VERSIONS_HEADING + versions, 1)
    path.write_text(text, encoding="utf-8")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed as a distribution"


# -- base model, data, loss -------------------------------------------------------------------------------


def _set_base(card: SentenceTransformerModelCardData, specs: Sequence[EncoderSpec]) -> None:
    spec = specs[0]
    if len(specs) > 1 or Path(spec.backbone).is_dir():
        # A path is private and no hub id, and a card names one base: the folder's name must do.
        card.base_model = card.base_model_revision = None
        card.model_name = f"SentenceTransformer based on {public_name(specs)}"
    elif card.base_model is None:
        card.base_model, card.base_model_revision = spec.backbone, spec.revision


def _read(source: Source, cache_dir: Path) -> Dataset | None:
    if source.streaming:  # reading all of it for a few samples is no bargain
        return None
    try:
        if isinstance(source, EvalSource) and source.searches:
            sets = load_collections(source, cache_dir).values()
            return Dataset.from_dict({"query": [text for one in sets for text in one.queries]})
        rows = load(source, cache_dir)
    except Exception as error:
        # Data may have moved since the training; the model is worth more than its samples.
        logger.warning(f"the model card shows no samples of {source.path}: {error}")
        return None
    # A group is a number without meaning, and of a text that is not there nothing can be shown.
    return rows.select_columns([c for c in rows.column_names if c != "group" and not rows.data.column(c).null_count])


def _dataset_entry(
    card: SentenceTransformerModelCardData,
    source: Source,
    rows: Dataset | None,
    judge: object,
    settings: Mapping[str, Any],
    has_towers: bool,
) -> dict[str, Any]:
    """Size, columns, statistics and samples of a data set, and the loss or evaluator that judged it."""
    is_hub = rows is not None and is_hub_id(source.path)
    name = source.path if is_hub else Path(source.path).name
    if isinstance(source, EvalSource):
        name = f"{source.name} ({name})"
    entry: dict[str, Any] = {"name": name}
    if is_hub:
        entry |= {"id": source.path} | ({"revision": source.revision} if source.revision else {})
    if rows is None:
        entry["columns"] = [f"<code>{column}</code>" for column in source.columns]
    else:
        columns = rows.column_names if has_towers else []
        tasks = {name: "query" if name == "anchor" else "document" for name in columns}
        card.compute_dataset_metrics(rows, entry, loss=None, router_mapping=tasks)
        if "score" in entry["examples"]:  # float32 shows as 0.6000000238418579
            entry["examples"]["score"] = [round(score, 4) for score in entry["examples"]["score"]]
    entry["loss"] = {"fullname": fullname(judge)}
    if settings:
        code = json.dumps(dict(settings), indent=4, default=str)
        entry["loss"]["config_code"] = indent(f"```json\n{code}\n```", "  ")
    return entry


def _set_citations(card: SentenceTransformerModelCardData, losses: Sequence[Loss]) -> None:
    """Sentence-BERT and the papers of the losses, each once."""
    card.set_losses([])
    (sbert,) = card.citations.values()
    key = sbert.split("{", 1)[1].split(",", 1)[0]
    names, others = ["Sentence Transformers"], {}
    for part in (part for loss in losses for part in loss.parts()):
        name = type(part).__name__
        card.add_tags(f"loss:{name}")
        if f"{{{key}," in part.citation:
            names.append(name)
        elif part.citation:
            others[name] = part.citation
    card.citations = {" and ".join(names): sbert, **others}


# -- samples --------------------------------------------------------------------------------------------


def _set_examples(card: SentenceTransformerModelCardData, candidates: Sequence[Dataset]) -> None:
    """Texts of the data for the usage snippet: the same at every export, and without a bar for so short a work."""
    if not candidates:
        return
    state = random.getstate()  # a fit may go on after this export
    random.seed(0)
    try:
        with redirect_stderr(StringIO()):
            card.set_widget_examples(candidates[0])
    finally:
        random.setstate(state)
