"""Exact top-k against brute force in NumPy."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from trainer.evaluation.topk import Neighbours, Similarity, merge_top_k, top_k


def brute_force(queries: np.ndarray, corpus: np.ndarray, k: int, similarity: Similarity) -> tuple[np.ndarray, ...]:
    """Scores and ids by a stable sort of the whole matrix, in float64."""
    queries, corpus = queries.astype(np.float64), corpus.astype(np.float64)
    if similarity == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        corpus = corpus / np.linalg.norm(corpus, axis=1, keepdims=True)
    scores = queries @ corpus.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def whole_numbers(num_rows: int, seed: int) -> np.ndarray:
    """Small whole numbers: their products are exact in float32, and many are equal, some 0 and negative."""
    return np.random.default_rng(seed).integers(-2, 3, size=(num_rows, 4)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("chunks", [(1000, 1000), (3, 16), (5, 1)])
def test_ties_go_to_the_lower_id_in_any_chunks(k: int, chunks: tuple[int, int]) -> None:
    queries, corpus = whole_numbers(11, seed=0), whole_numbers(130, seed=1)
    scores, ids = brute_force(queries, corpus, k, "dot")
    found = top_k(
        torch.from_numpy(queries),
        torch.from_numpy(corpus),
        k,
        similarity="dot",
        query_chunk=chunks[0],
        corpus_chunk=chunks[1],
    )
    assert found.ids_Qk.shape == (11, min(k, 130))
    np.testing.assert_array_equal(found.scores_Qk.numpy(), scores)
    np.testing.assert_array_equal(found.ids_Qk.numpy(), ids)
    assert len(np.unique(scores)) < 30, "there should be ties"


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_real_numbers(similarity: Similarity) -> None:
    rng = np.random.default_rng(2)
    queries, corpus = rng.normal(size=(40, 24)) * 3, rng.normal(size=(500, 24))
    scores, ids = brute_force(queries, corpus, 20, similarity)
    found = top_k(torch.from_numpy(queries), torch.from_numpy(corpus), 20, similarity=similarity, corpus_chunk=64)
    np.testing.assert_array_equal(found.ids_Qk.numpy(), ids)
    np.testing.assert_allclose(found.scores_Qk.numpy(), scores, atol=1e-5)


def test_shards_merge_to_the_whole() -> None:
    """Shards of any size, one with fewer documents than k and one empty; the order of the parts does not matter."""
    queries, corpus = torch.from_numpy(whole_numbers(9, seed=3)), torch.from_numpy(whole_numbers(100, seed=4))
    whole = top_k(queries, corpus, 10, similarity="dot")
    parts, start = [], 0
    for size in (50, 3, 0, 47):
        scores_Qk, ids_Qk = top_k(queries, corpus[start : start + size], 10, similarity="dot")
        parts.append(Neighbours(scores_Qk, start + ids_Qk))
        start += size
    for merged in (merge_top_k(parts, 10), merge_top_k(parts[::-1], 10)):
        assert torch.equal(merged.ids_Qk, whole.ids_Qk)
        assert torch.equal(merged.scores_Qk, whole.scores_Qk)


def test_pieces_of_a_corpus_are_taken_one_by_one() -> None:
    """From an iterator, in half precision as a file may hold them: never two pieces at once."""
    corpus = torch.from_numpy(whole_numbers(60, seed=5))
    queries = torch.from_numpy(whole_numbers(4, seed=6))
    taken = []

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, 60, 25):
            taken.append(start)
            yield corpus[start : start + 25].half()

    found = top_k(queries, pieces(), 5, similarity="dot", corpus_chunk=10)
    assert taken == [0, 25, 50]
    assert torch.equal(found.ids_Qk, top_k(queries, corpus, 5, similarity="dot").ids_Qk)


def test_autocast_does_not_round_the_products() -> None:
    rng = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(5, 64, generator=rng), torch.randn(200, 64, generator=rng)
    exact = top_k(queries, corpus, 10)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (queries @ corpus.T).dtype == torch.bfloat16
            found = top_k(queries, corpus, 10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert isinstance(found, Neighbours)
    assert torch.equal(found.scores_Qk, exact.scores_Qk)
    assert torch.equal(found.ids_Qk, exact.ids_Qk)


def test_no_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 0; it must be 1 or more"):
        top_k(torch.zeros(1, 2), torch.zeros(1, 2), 0)
