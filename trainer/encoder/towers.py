"""Separate towers: an encoder for queries and another one for documents, as one module of the same interface.

Shape suffixes: S segments (texts), B rows of this rank, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor, nn

from trainer.batch import PackedBatch
from trainer.encoder.encoder import Encoder
from trainer.encoder.folder import embedding_dimension, read_routes
from trainer.encoder.spec import EncoderSpec, errors_about
from trainer.encoder.text import TextPreparation, load_text_preparation


class Towers(nn.Module):
    """Queries and documents to embeddings of one space, each by its own encoder.

    Args:
        query: of the first column, anchor.
        document: of all other columns.

    Raises:
        ValueError: their embeddings differ in dimension.
    """

    def __init__(self, query: Encoder, document: Encoder) -> None:
        super().__init__()
        _refuse_dimensions(query.embedding_dimension, document.embedding_dimension)
        self.query = query
        self.document = document

    @property
    def parts(self) -> dict[str, Encoder]:
        """Both encoders, by the prefix of their weights' names."""
        return {"query.": self.query, "document.": self.document}

    @property
    def embedding_dimension(self) -> int:
        return self.query.embedding_dimension

    def forward(self, batch: PackedBatch) -> list[Tensor]:
        """Embeddings of the rows that count, one (B, D) tensor a column, float32."""
        assert batch.documents is not None
        return [*self.query(batch), *self.document(batch.documents)]

    def embed(self, batch: PackedBatch) -> Tensor:
        """Embeddings of the texts of a batch, which all belong to its tower: (S, D) float32."""
        assert batch.documents is None
        return (self.document if batch.tower == "document" else self.query).embed(batch)

    @contextmanager
    def as_sentence_transformer(self) -> Iterator[SentenceTransformer]:
        """The same weights as a Router of sentence-transformers inside the block: ``encode_query`` and
        ``encode_document`` take one of its routes each, plain ``encode`` that of documents."""
        with self.query.as_sentence_transformer() as query, self.document.as_sentence_transformer() as document:
            router = Router.for_query_document(list(query.children()), list(document.children()))  # type: ignore[arg-type]
            prompts = {"query": self.query.text.prompt, "document": self.document.text.prompt}
            model = SentenceTransformer(
                modules=[router],
                device=str(next(self.parameters()).device),
                prompts=prompts,
                default_prompt_name="document" if prompts["document"] else None,
                similarity_fn_name=document.similarity_fn_name,
            )
            yield model.eval()


def load_encoder(
    spec: EncoderSpec, document_spec: EncoderSpec | None, max_tokens: int, text: TextPreparation | None = None
) -> Encoder | Towers:
    """The encoder of all texts, or the two of queries and of documents.

    Args:
        text: what `load_texts` gave for them, if somebody has called it already.

    Raises:
        ValueError: as `Encoder`, or the two do not fit together.
    """
    if document_spec is None:
        return Encoder(spec, max_tokens, text)
    query = Encoder(spec, max_tokens, text and replace(text, documents=None))
    with errors_about("model.document_encoder"):
        document = Encoder(document_spec, max_tokens, text and text.documents)
    return Towers(query, document)


def load_texts(spec: EncoderSpec, document_spec: EncoderSpec | None) -> TextPreparation:
    """What turns queries and documents into token ids, without weights.

    Raises:
        ValueError: as `load_text_preparation`, or embeddings of different dimensions, or routes that share layers.
    """
    text = load_text_preparation(spec)
    if document_spec is None:
        return text
    with errors_about("model.document_encoder"):
        documents = load_text_preparation(document_spec)
    _refuse_unfit(spec, document_spec)
    # A text has the same pieces in both columns only if tokenizer and prompt are the same.
    differ = replace(documents, max_length=text.max_length).fingerprint != text.fingerprint
    return replace(text, documents=replace(documents, hash_seed=int(differ)))


def _refuse_unfit(spec: EncoderSpec, document_spec: EncoderSpec) -> None:
    """What small files tell, before any weights are read."""
    _refuse_dimensions(embedding_dimension(spec), embedding_dimension(document_spec))
    if spec.backbone != document_spec.backbone or spec.route is None or spec.route == document_spec.route:
        return
    routes = read_routes(spec)
    paths = [{module["path"] for module in routes[str(one.route)]} for one in (spec, document_spec)]
    if shared := sorted(paths[0] & paths[1]):
        raise ValueError(
            f"the routes '{spec.route}' and '{document_spec.route}' of '{spec.backbone}' share {', '.join(shared)}, "
            "which two towers would train apart; take a backbone without shared layers, or one encoder for all texts"
        )


def _refuse_dimensions(query: int, document: int) -> None:
    if query != document:
        raise ValueError(
            f"the embeddings of model.encoder have {query} dimensions, those of model.document_encoder {document}: a "
            "query and a document are compared, so take backbones of one size, or one that ends in a Dense layer of "
            "sentence-transformers with the other's size"
        )
