"""Training the used rows of the embedding matrix is training all of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, Gemma3TextConfig, Gemma3TextModel

from tests.batches import build_batch
from trainer.batch import PackedBatch
from trainer.data.collate import pack_texts
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.vocabulary import CompactEmbedding
from trainer.losses import CosineSimilarity

NUM_STEPS, ROWS = 20, 8
LEARNING_RATE = 1e-3


@dataclass
class Trained:
    encoder: Encoder
    matrix: Tensor
    norms: list[float]


def _load(folder: Path) -> Encoder:
    return Encoder(EncoderSpec(backbone=str(folder), dropout=0.0), 16384)


def _matrix(encoder: Encoder) -> Tensor:
    backbone: Any = encoder.backbone
    return backbone.get_input_embeddings().weight


def _batches(encoder: Encoder, texts: list[str]) -> list[PackedBatch]:
    scores = torch.linspace(-1.0, 1.0, ROWS).tolist()
    ids = encoder.text(texts)
    starts = [2 * ROWS * step for step in range(NUM_STEPS)]
    return [build_batch([ids[s : s + ROWS], ids[s + ROWS : s + 2 * ROWS]], scores=scores) for s in starts]


def _train(folder: Path, texts: list[str], decay: float, compact: bool) -> Trained:
    """AdamW under a falling learning rate and with clipping that cuts at every step."""
    encoder = _load(folder).train()
    batches = _batches(encoder, texts)
    if compact:
        encoder.compact_vocabulary(torch.unique(torch.cat([batch.input_ids_T for batch in batches])))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=decay, fused=True)
    loss, norms = CosineSimilarity(), []
    for step, batch in enumerate(batches):
        rate = LEARNING_RATE * (1.0 - step / NUM_STEPS)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(encoder(batch), batch.targets).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, 0.05)))
        optimizer.step()
        if encoder.vocabulary is not None:
            encoder.vocabulary.decay_unused(1.0 - rate * decay)
    matrix = _matrix(encoder).detach() if encoder.vocabulary is None else encoder.vocabulary.full_weight()
    return Trained(encoder, matrix, norms)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert", "qwen3"])
def test_compact_is_full(tiny_encoders: dict[str, Path], demo_texts: list[str], kind: str, decay: float) -> None:
    """After 20 AdamW steps: used rows, rows that no text uses, the other weights, and embeddings of unseen texts.

    DeBERTa runs padded: its padding piece must have a place among the used ones.
    """
    texts = [text.split(" at ")[0] for text in demo_texts][: 2 * ROWS * NUM_STEPS]
    full, compact = (_train(tiny_encoders[kind], texts, decay, compact) for compact in (False, True))
    start = _matrix(_load(tiny_encoders[kind])).detach()
    vocabulary = compact.encoder.vocabulary
    assert vocabulary is not None
    unused = torch.ones(len(start), dtype=torch.bool)
    unused[vocabulary.used_ids] = False
    assert 20 < unused.sum() < len(start) - 20, "a test of nothing"
    assert vocabulary.weight.shape == (len(start) - int(unused.sum()), 32)
    assert min(full.norms) > 0.05, "clipping that does not cut"
    assert compact.norms == pytest.approx(full.norms, rel=1e-5)
    assert float((full.matrix - start)[~unused].abs().max()) > 1e-3
    assert (float((full.matrix - start)[unused].abs().max()) > 1e-6) == (decay > 0)
    assert_close(compact.matrix, full.matrix, rtol=0.0, atol=1e-6)
    assert_close(compact.matrix[unused], full.matrix[unused], rtol=1e-6, atol=0.0)
    others = dict(compact.encoder.backbone.named_parameters())
    for name, parameter in full.encoder.backbone.named_parameters():
        if not name.endswith(("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight")):
            assert_close(others[name], parameter, rtol=0.0, atol=1e-6, msg=name)
    batch = pack_texts(full.encoder.text(demo_texts[:40]))
    with torch.no_grad():
        full_embeddings, embeddings = (t.encoder.eval().embed(batch) for t in (full, compact))
        assert bool(unused[batch.input_ids_T].any()), "no unused piece in the evaluation"
    assert_close(embeddings, full_embeddings, rtol=0.0, atol=1e-5)
    with compact.encoder.as_sentence_transformer() as model:
        backbone: Any = model[0].model
        exported = backbone.get_input_embeddings().weight
        assert_close(exported, full.matrix, rtol=0.0, atol=1e-6)


@pytest.fixture(scope="module")
def scaled_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: dict[str, Path]) -> Path:
    """A Gemma-3, whose embeddings are multiplied by the root of their width."""
    folder = tmp_path_factory.mktemp("gemma3") / "encoder"
    shutil.copytree(tiny_encoders["qwen3"], folder)
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    config = Gemma3TextConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
    )  # fmt: skip
    Gemma3TextModel(config).save_pretrained(folder)
    return folder


def test_scaled_embeddings_are_scaled_and_exported(scaled_encoder: Path, demo_texts: list[str]) -> None:
    texts = demo_texts[: 2 * ROWS * NUM_STEPS]
    full, compact = (_train(scaled_encoder, texts, 0.01, compact) for compact in (False, True))
    assert compact.encoder.vocabulary is not None
    assert_close(compact.matrix, full.matrix, rtol=0.0, atol=1e-6)
    with torch.no_grad():
        trained = compact.encoder.eval().embed(pack_texts(compact.encoder.text(demo_texts[:40])))
    with compact.encoder.as_sentence_transformer() as model:
        assert type(model[0].model.get_input_embeddings()).__name__ == "Gemma3TextScaledWordEmbedding"
        assert_close(model.encode(demo_texts[:40], convert_to_tensor=True).cpu(), trained, rtol=0.0, atol=1e-5)
    assert compact.encoder.vocabulary is not None
    assert_close(compact.encoder.embed(pack_texts(compact.encoder.text(demo_texts[:40]))), trained)


@pytest.mark.parametrize("base", [nn.Embedding, nn.Module])
def test_an_embedding_of_another_kind_stays_whole(
    tiny_encoder: Path, caplog: pytest.LogCaptureFixture, base: type[nn.Module]
) -> None:
    class Odd(base):  # type: ignore[misc, valid-type]
        """Does who knows what."""

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.weight[input_ids]

    encoder = _load(tiny_encoder)
    odd = Odd(*_matrix(encoder).shape) if base is nn.Embedding else Odd()
    odd.weight = nn.Parameter(_matrix(encoder).detach())
    encoder.backbone.set_input_embeddings(odd)
    encoder.compact_vocabulary(torch.arange(10))
    assert encoder.vocabulary is None
    assert encoder.backbone.get_input_embeddings() is odd
    assert "the Odd of this backbone is more than a table of rows" in caplog.text


def _small() -> tuple[nn.Embedding, CompactEmbedding]:
    torch.manual_seed(0)
    full = nn.Embedding(10, 3)
    return full, CompactEmbedding(full.weight, torch.tensor([1, 4, 9]))


def test_an_unused_piece_is_looked_up_in_evaluation_only() -> None:
    full, compact = _small()
    ids = torch.tensor([[9, 0], [4, 5]])
    assert torch.equal(compact.eval()(ids), full(ids))
    assert compact(ids).requires_grad
    compact.decay_unused(0.5)
    compact.decay_unused(0.5)
    expected = full(ids).detach()
    expected[0, 1] *= 0.25
    expected[1, 1] *= 0.25
    assert torch.equal(compact(ids), expected)
    compact.train()
    assert torch.equal(compact(torch.tensor([1, 4])), full(torch.tensor([1, 4])))
    with pytest.raises(IndexError):
        compact(ids)


def test_padding_gets_no_gradient_even_inside_a_text() -> None:
    """A decoder may pad with the piece that ends every text; nn.Embedding leaves its row out."""
    torch.manual_seed(0)
    full = nn.Embedding(10, 3, padding_idx=4)
    compact = CompactEmbedding(full.weight, torch.tensor([1, 4, 9]), padding_id=4)
    ids = torch.tensor([[9, 4], [1, 4]])
    for embedding in (full, compact):
        (embedding(ids) * torch.arange(1.0, 13.0).view(2, 2, 3)).sum().backward()
    assert full.weight.grad is not None
    assert_close(compact.weight.grad, full.weight.grad[[1, 4, 9]])
    assert compact.weight.grad is not None
    assert not compact.weight.grad[1].any()


def test_the_full_matrix_is_put_together() -> None:
    full, compact = _small()
    before = full.weight.detach().clone()
    with torch.no_grad():
        compact.weight.add_(1.0)
    compact.decay_unused(0.9)
    expected = before * 0.9
    expected[[1, 4, 9]] = before[[1, 4, 9]] + 1.0
    assert_close(compact.full_weight(), expected)
    assert torch.equal(full.weight, before)
    assert not compact.full_weight().requires_grad


def test_many_small_decays_keep_their_product() -> None:
    """A float32 product of 100,000 factors next to 1 would be off by a percent."""
    _, compact = _small()
    for _ in range(100_000):
        compact.decay_unused(1.0 - 5e-5 * 0.01)
    assert float(compact.decay) == pytest.approx((1.0 - 5e-7) ** 100_000, rel=1e-9)


def test_only_used_rows_are_saved() -> None:
    _, compact = _small()
    assert {name: tuple(x.shape) for name, x in compact.state_dict().items()} == {
        "weight": (3, 3),
        "used_ids": (3,),
        "decay": (),
    }


def test_the_checksum_is_that_of_the_base() -> None:
    full, compact = _small()
    checksum = compact.base_checksum()
    with torch.no_grad():
        compact.weight.add_(1.0)
    assert compact.base_checksum() == checksum
    assert CompactEmbedding(full.weight, torch.tensor([2])).base_checksum() == checksum
    with torch.no_grad():
        full.weight[0, 0] += 1e-6
    assert CompactEmbedding(full.weight, torch.tensor([1, 4, 9])).base_checksum() != checksum


def test_special_pieces_are_always_used_and_a_second_call_starts_from_the_base(tiny_encoder: Path) -> None:
    encoder = _load(tiny_encoder)
    base = _matrix(encoder).detach().clone()
    encoder.compact_vocabulary(torch.tensor([30, 20]))
    vocabulary = encoder.vocabulary
    assert vocabulary is not None
    special = set(encoder.text.tokenizer.all_special_ids)
    assert vocabulary.used_ids.tolist() == sorted(special | {20, 30})
    encoder.compact_vocabulary(torch.tensor([40]))
    again = encoder.vocabulary
    assert again is not None
    assert again.used_ids.tolist() == sorted(special | {40})
    assert_close(again.full_weight(), base, rtol=0.0, atol=0.0)
