"""A permutation that is never written down: whole, and as chance would have it. The keys are fixed, so what is said of
chance can't fail by chance."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from trainer.data.permutation import mix, permute

SIZES = [1, 2, 3, 5, 16, 17, 1000]


def _images(size: int, key: int) -> NDArray[np.int64]:
    return permute(np.arange(size), size, key)


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size: int) -> None:
    for key in range(50):
        assert sorted(_images(size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_few_rows_are_equally_likely(size: int) -> None:
    _, counts = np.unique([_images(size, mix(key)) for key in range(4800)], axis=0, return_counts=True)
    assert len(counts) == {2: 2, 3: 6, 4: 24}[size]
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [100, 1000, 4097])
def test_an_image_says_nothing_about_its_place(size: int) -> None:
    """Chi-square over a table of 10 x 10 bins of place and image, summed over many keys."""
    num_keys = 200_000 // size
    images = np.stack([_images(size, mix(key)) for key in range(num_keys)])
    places = np.broadcast_to(np.arange(size), images.shape)
    table, _, _ = np.histogram2d(places.ravel(), images.ravel(), bins=10, range=[[0, size]] * 2)
    bins = np.histogram(np.arange(size), bins=10, range=(0, size))[0]
    expected = np.outer(bins, bins) / size * num_keys
    # Permutations fix the margins: 9 x 9 degrees of freedom; the cells of one vary by size / (size - 1) more.
    assert chisquare(table.ravel(), expected.ravel(), ddof=100 - 1 - 81).pvalue > 1e-3


@pytest.mark.parametrize("size", [1000, 4097])
def test_displacement_neighbours_and_fixed_points_are_those_of_chance(size: int) -> None:
    num_keys = 200
    images = np.stack([_images(size, mix(key, 1)) for key in range(num_keys)])
    displacement = np.abs(images - np.arange(size)).mean()
    assert displacement == pytest.approx((size * size - 1) / (3 * size), rel=0.01)
    # Each is Poisson with mean 1 per permutation: 200 in all, standard deviation 14.
    assert abs((images == np.arange(size)).sum() - num_keys) < 60
    assert abs((np.diff(images, axis=1) == 1).sum() - num_keys) < 60
    assert abs((np.diff(images, axis=1) == -1).sum() - num_keys) < 60
