"""Plots are well-formed, lie inside their frame, and the pixels give the values back."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from trainer.compare.fold import Point, Spread
from trainer.compare.plots import HEIGHT, WIDTH, curves, dots, histograms, thinned, ticks


def line(values: list[float], deviation: float | None = 0.1) -> list[Point]:
    return [Point(float(x), Spread(value, deviation, 3)) for x, value in enumerate(values)]


def pixels(element: ElementTree.Element) -> np.ndarray:
    return np.array([[float(n) for n in pair.split(",")] for pair in element.attrib["points"].split()])


def test_the_pixels_of_a_curve_give_its_values_back() -> None:
    """As the script of the page reads them under the pointer."""
    values = [0.1, 0.75, 0.7, 1.3]
    svg = ElementTree.fromstring(curves("a <b> & c", [line(values), [], line([0.2], None)], "steps"))
    assert svg.attrib["aria-label"] == "a <b> & c"
    polylines = svg.findall("polyline")
    assert [one.attrib["data-group"] for one in polylines] == ["0", "2"]
    points = pixels(polylines[0])
    (x0, x1, left, right), (y0, y1, bottom, top) = (map(float, svg.attrib[k].split()) for k in ("data-x", "data-y"))
    assert x0 + (points[:, 0] - left) / (right - left) * (x1 - x0) == pytest.approx([0, 1, 2, 3], abs=1e-3)
    assert y0 + (points[:, 1] - bottom) / (top - bottom) * (y1 - y0) == pytest.approx(values, abs=1e-4)
    (band,) = svg.findall("polygon")
    both = pixels(band)
    assert len(both) == 8
    assert (both >= 0).all()
    assert (both <= [WIDTH, HEIGHT]).all()
    assert len(svg.findall("circle")) == 1, "a curve of one point would not be seen"


def test_a_curve_of_equal_values_and_no_curve() -> None:
    assert "nan" not in curves("x", [line([0.5, 0.5], 0.0)], "steps")
    assert "nan" not in curves("x", [line([0.0], None)], "steps")
    assert curves("x", [[], []], "steps") == dots("x", ["a"], [[]]) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.7423, 0.7431), (-3.2, 4e6), (1e-6, 2e-5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 6)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 * abs(high) for tick in found)
    steps = np.diff(found)
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
    assert f"{steps[0]:.0e}"[0] in "125"


def test_many_points_are_averaged_to_few() -> None:
    values = np.sin(np.arange(5003) / 300)
    few = thinned(line(values.tolist()))
    assert len(few) <= 151
    assert (few[-1].x, few[-1].value.mean) == (5002, values[-1])
    size = 34
    assert [p.value.mean for p in few[:-2]] == pytest.approx(values[: size * (len(few) - 2)].reshape(-1, size).mean(1))


def test_every_run_is_a_dot() -> None:
    svg = ElementTree.fromstring(dots("x", ["a", "b"], [[0.1, 0.2, 0.3], [0.5]]))
    assert len(svg.findall("circle")) == 4
    means = [one for one in svg.findall("line") if "mean" in one.attrib["class"]]
    middle = svg.findall("circle")[1].attrib["cx"]
    assert means[0].attrib["x1"] == middle


def test_histogram_areas_are_the_shares() -> None:
    svg = ElementTree.fromstring(histograms("x", [0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0], 1))
    negative, positive = svg.findall("polygon")
    assert "rest" in negative.attrib["class"]
    heights = pixels(positive)[1:-1:2, 1]
    floor = pixels(positive)[0, 1]
    assert (floor - heights) / (floor - pixels(negative)[1, 1]) == pytest.approx([0.0, 0.25, 0.75, 0.0], abs=1e-3)
