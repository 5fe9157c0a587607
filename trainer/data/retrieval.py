"""Retrieval sets: queries, a corpus and judgements become a `Collection`, checked once and cached as Arrow.

BEIR's folders (corpus.jsonl, queries.jsonl, qrels/test.tsv) and NanoBEIR's data sets (corpus, queries, qrels, each with
a table for each set) load as they are; so do three files of any format, and judgements of TREC.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.data.cache import place_of, use
from trainer.data.checks import BadRows
from trainer.data.columns import Column, find_column, is_position
from trainer.data.derived import draw
from trainer.data.evalsource import EvalSource
from trainer.data.files import FORMATS, JSON_LINES, data_format
from trainer.data.layouts import HubTable, Part, Parts, find_parts
from trainer.data.loading import RowsFile, content_hash, file_rows, hub_rows
from trainer.data.rows import Record, Rows, table_rows, text_blocks
from trainer.data.values import MAX_LABEL, BadValueError, check_id, check_text, to_number
from trainer.evaluation.search import Collection

_VERSION = 4  # of the cached sets: raise it when the same files and spec give other ones
# Names that a column usually has; the first that is there is taken.
_USUAL: dict[str, tuple[str, ...]] = {
    "query_id": ("_id", "id", "query_id", "query-id", "qid"),
    "query": ("text", "query"),
    "document_id": ("_id", "id", "doc_id", "docid", "corpus-id", "pid"),
    "title": ("title",),
    "document": ("text", "document", "contents", "passage"),
    "judged_query": ("query-id", "query_id", "query", "qid"),
    "judged_document": ("corpus-id", "corpus_id", "doc-id", "doc_id", "doc", "docid", "pid"),
    "relevance": ("score", "relevance", "rel", "label"),
}
_OPTIONAL = ("title", "relevance")


def load_collections(source: EvalSource, cache_dir: Path, verify: bool = False) -> dict[str, Collection]:
    """The sets of ``source`` by name: <source>, or <source>/<set> where it holds several.

    Args:
        source: whose evaluator searches.
        cache_dir: where what was read lies.
        verify: read the files that are there, and build them again where one is damaged.

    Raises:
        ValueError: missing files or columns, ids that stand twice, judgements that contradict each other, judged
            documents that are not in the corpus.
    """
    found = {}
    for parts in find_parts(source):
        folder = place_of(cache_dir, "retrieval", _fingerprint(source, parts))
        use(folder, partial(_build, source, parts), verify)
        name = f"{source.name}/{parts.name}" if parts.name else source.name
        found[name] = _collection(source, folder)
    return found


def collections_fingerprint(source: EvalSource) -> str:
    """Hash of what ``load_collections`` gives."""
    keys = [_fingerprint(source, parts) for parts in find_parts(source)]
    spec = json.dumps([keys, source.max_rows, source.corpus_size, sorted((source.prompts or {}).items())])
    return hashlib.sha256(spec.encode()).hexdigest()[:24]


def _collection(source: EvalSource, folder: Path) -> Collection:
    """What the source takes of a cached set, with its prompts."""
    queries, corpus, qrels = (_read(folder / f"{name}.arrow") for name in ("queries", "corpus", "qrels"))
    judgements = np.stack([qrels[name].to_numpy() for name in ("query", "document", "relevance")], axis=1)
    kept_queries = draw(len(queries), source.max_rows or len(queries))
    judgements = judgements[np.isin(judgements[:, 0], kept_queries)]
    kept_documents = _kept_documents(len(corpus), np.unique(judgements[:, 1]), source.corpus_size)
    relevance: list[dict[int, int]] = [{} for _ in kept_queries]
    query_numbers = np.searchsorted(kept_queries, judgements[:, 0]).tolist()
    document_numbers = np.searchsorted(kept_documents, judgements[:, 1]).tolist()
    for query, document, grade in zip(query_numbers, document_numbers, judgements[:, 2].tolist(), strict=True):
        relevance[query][document] = grade
    queries, corpus = queries.take(pa.array(kept_queries)), corpus.take(pa.array(kept_documents))
    return Collection(
        query_ids=queries["id"].to_pylist(),
        queries=source.prompted("query", queries["text"].to_pylist()),
        document_ids=corpus["id"].to_pylist(),
        documents=source.prompted("document", corpus["text"].to_pylist()),
        relevance_Q=relevance,
    )


def _kept_documents(num_documents: int, judged: NDArray[np.int64], size: Optional[int]) -> NDArray[np.int64]:
    """Numbers of the documents to search, ascending: the judged ones, and others drawn evenly."""
    if size is None or size >= num_documents:
        return np.arange(num_documents)
    others = np.setdiff1d(np.arange(num_documents), judged)
    return np.sort(np.concatenate([judged, others[draw(len(others), max(0, size - len(judged)))]]))


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def _fingerprint(source: EvalSource, parts: Parts) -> str:
    contents = [
        [hub_rows(*part)._fingerprint] if isinstance(part, HubTable) else [content_hash(file) for file in part]
        for part in (parts.queries, parts.corpus, parts.qrels)
    ]
    spec = json.dumps([_VERSION, contents, sorted(source.columns.items()), source.on_bad_row, source.max_bad_rows])
    return hashlib.sha256(spec.encode()).hexdigest()[:24]


# -- reading ----------------------------------------------------------------------------------------------


def _build(source: EvalSource, parts: Parts, folder: Path) -> None:
    """Write what is relevant of a set: its queries that have a relevant document, all documents, the judgements."""
    bad = BadRows(source)
    query_texts: dict[str, str] = {}
    for _, query_id, text in _texts(source, parts.queries, "query_id", ("query",), bad):
        query_texts[query_id] = text
    numbers: dict[str, int] = {}

    def documents() -> Iterator[tuple[str, str]]:
        for _, document_id, text in _texts(source, parts.corpus, "document_id", ("title", "document"), bad):
            numbers[document_id] = len(numbers)
            yield document_id, text

    named = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
    _write(folder / "corpus.arrow", named, documents())
    judged: dict[str, dict[int, int]] = {}
    for place, query_id, document_id, relevance in _judgements(source, parts.qrels, bad):
        if query_id not in query_texts or document_id not in numbers:
            what, where = ("document", "corpus") if query_id in query_texts else ("query", "queries")
            bad.add(f"{place}: judges {what} '{document_id if what == 'document' else query_id}', not in the {where}")
        else:
            before = judged.setdefault(query_id, {}).setdefault(numbers[document_id], relevance)
            if before != relevance:
                pair = f"document '{document_id}' for query '{query_id}'"
                bad.add(f"{place}: judges {pair} with {relevance}, and a row before it with {before}")
    bad.close()
    kept = [query_id for query_id in query_texts if max(judged.get(query_id, {}).values(), default=0) > 0]
    if not kept:
        raise ValueError(f"{source.path}: none of {len(query_texts):,} queries has a relevant document")
    _write(folder / "queries.arrow", named, ((query_id, query_texts[query_id]) for query_id in kept))
    whole = pa.schema([("query", pa.int64()), ("document", pa.int64()), ("relevance", pa.int64())])
    triples = ((i, *judgement) for i, query_id in enumerate(kept) for judgement in judged[query_id].items())
    _write(folder / "qrels.arrow", whole, triples)
    report = {"source": source.path, "num_rows": len(numbers), "num_skipped": bad.count}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _write(path: Path, schema: pa.Schema, rows: Iterable[tuple[Any, ...]]) -> None:
    with RowsFile(schema, path) as file:
        for cells in rows:
            file.add_row(cells)


def _texts(
    source: EvalSource, part: Part, id_name: str, text_names: Sequence[str], bad: BadRows
) -> Iterator[tuple[str, str, str]]:
    """Place, id and text of the good rows; the title, where there is one, stands before the text."""
    first_place: dict[str, str] = {}
    for rows in _open(part):
        columns = _columns(source, rows, (id_name, *text_names))
        for number, row in rows.records:
            place = rows.place(number)
            try:
                cells = _cells(row, columns)
                row_id = _id(cells[id_name], columns[id_name])
                text = _joined([cells[name] for name in text_names if cells[name] is not None])
            except BadValueError as error:
                bad.add(f"{place}: {error}")
                continue
            if row_id in first_place:
                bad.add(f"{place}: the id '{row_id}' stands at {first_place[row_id]} too")
                continue
            first_place[row_id] = place
            yield place, row_id, text


def _joined(texts: Sequence[Any]) -> str:
    """Title and text with a blank between, as BEIR does; one of them may be empty."""
    if len(texts) < 2:
        return check_text(texts[0] if texts else None)
    wrong = [text for text in texts if not isinstance(text, str)]
    return check_text(wrong[0] if wrong else " ".join(text.strip() for text in texts).strip())


def _judgements(source: EvalSource, part: Part, bad: BadRows) -> Iterator[tuple[str, str, str, int]]:
    """Place, query id, document id and relevance; where a cell lists documents, one of each."""
    names = ("judged_query", "judged_document", "relevance")
    for rows in _open(part, read_judgements):
        columns = _columns(source, rows, names)
        for number, row in rows.records:
            place = rows.place(number)
            try:
                cells = _cells(row, columns)
                query_id = _id(cells["judged_query"], columns["judged_query"])
                relevance = _relevance(cells["relevance"], columns["relevance"])
                listed = cells["judged_document"]
                for document in listed if isinstance(listed, list) else [listed]:
                    yield place, query_id, _id(document, columns["judged_document"]), relevance
            except BadValueError as error:
                bad.add(f"{place}: {error}")


def _columns(source: EvalSource, rows: Rows, names: Sequence[str]) -> dict[str, Optional[Column]]:
    """The column of each of ``names``.

    Raises:
        ValueError: one is missing, or what should name the columns of a CSV or TSV is likely its first row, which
            would be lost: a query less, and nobody would see it.
    """
    columns = {name: _column(source, rows, name) for name in names}
    asked = [source.columns.get(name) for name, column in columns.items() if column is not None]
    is_delimited = data_format(Path(rows.name)) in (".csv", ".tsv") and bool(rows.columns)
    usual = {name for names in _USUAL.values() for name in names}
    if (
        is_delimited
        and all(one is not None and is_position(one) and str(one) not in rows.columns for one in asked)
        and usual.isdisjoint(name.lower() for name in rows.columns)
    ):
        first = ", ".join(f"'{name:.40}'" for name in rows.columns)
        raise ValueError(
            f"{rows.name}: its first line should name its columns, but holds {first}: if it is a row, write a header "
            f"above it; if not, say its names instead of positions: columns: {{{names[0]}: {columns[names[0]]}, ...}}"
        )
    return columns


def _column(source: EvalSource, rows: Rows, name: str) -> Optional[Column]:
    """The column of ``name`` as the config says, else by its usual names; None for an optional one that is missing."""
    if name in source.columns:
        return find_column(source.columns[name], rows.name, rows.columns, f"columns.{name}")
    for usual in _USUAL[name]:
        if usual in rows.columns:
            return Column(usual)
    if name == "title" and data_format(Path(rows.name)) in JSON_LINES:
        return Column(name)  # each row names what it has, and the first ones may have no title
    if name in _OPTIONAL:
        return None
    if not rows.columns:
        raise ValueError(f"{rows.name}: there is no row")
    raise ValueError(
        f"{rows.name}: which column is the {name}? found: {', '.join(rows.columns)}; say it: columns: {{{name}: ...}}"
    )


def _cells(row: dict[str, Any] | str, columns: dict[str, Optional[Column]]) -> dict[str, Any]:
    if isinstance(row, str):
        raise BadValueError(row)
    try:
        return {
            name: None if column is None or (name == "title" and column.name not in row) else column.cell(row)
            for name, column in columns.items()
        }
    except LookupError as error:
        raise BadValueError(f"column {error} is missing") from error


def _id(value: object, column: Optional[Column]) -> str:
    try:
        return check_id(value)
    except BadValueError as error:
        raise BadValueError(f"column '{column}' {error}") from None


def _relevance(value: object, column: Optional[Column]) -> int:
    if column is None:
        return 1
    try:
        number = to_number(value)
    except BadValueError as error:
        raise BadValueError(f"column '{column}' {error}") from None
    if not number.is_integer() or abs(number) > MAX_LABEL:
        raise BadValueError(f"column '{column}' is {number:g}, not a whole number up to {MAX_LABEL:,}")
    return int(number)


def _open(part: Part, read_other: Optional[Callable[[Path], Rows]] = None) -> Iterator[Rows]:
    if isinstance(part, HubTable):
        rows = hub_rows(*part)
        yield table_rows(part.path, rows.features.arrow_schema, rows.with_format("arrow").iter(1000))
        return
    for file in part:
        if read_other is not None and data_format(file) in ("", ".tsv"):
            yield read_other(file)
        elif data_format(file):
            yield file_rows(file)
        else:
            raise ValueError(f"{file}: unknown format; known are {', '.join(FORMATS)}, each also with .gz")


def read_judgements(path: Path) -> Rows:
    """Judgements as lines of TREC (query, iteration, document, relevance; blanks between), or a TSV with a header."""
    first = next((line for block in text_blocks(path) for _, line in block.numbered() if line.strip()), "")
    cells = first.split()
    if len(cells) != 4 or not re.fullmatch(r"[+-]?\d+", cells[3]):
        if data_format(path):
            return file_rows(path)
        raise ValueError(f"{path}: neither lines of TREC (query 0 document relevance) nor a known format")

    def records() -> Iterator[Record]:
        for block in text_blocks(path):
            for number, line in block.numbered():
                found = line.split()
                if len(found) == 4:
                    yield number, {"query-id": found[0], "corpus-id": found[2], "score": found[3]}
                elif found:
                    yield number, f"{len(found)} fields, a line of TREC has 4"

    return Rows(str(path), ":", ["query-id", "corpus-id", "score"], records())
