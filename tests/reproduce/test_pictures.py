"""Figure 1 draws the paper's points and ours, also those with one value alone."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text
from PIL import Image

from digit.reproduce.pictures import (
    Point,
    chosen_classes,
    cited_points,
    covered,
    draw_overview,
    in_millions,
    overlap,
    overview,
)


def test_the_papers_points_are_those_of_its_tables():
    left, right = cited_points()
    digit = {(p.name, p.parameters): (p.x, p.y) for p in left if p.name.startswith("DiGIT")}
    assert digit == {
        ("DiGIT (+MaskGIT)", 219.0): (71.7, 9.04),
        ("DiGIT (+VQGAN)", 219.0): (71.7, 9.13),
        ("DiGIT (+VQGAN)", 732.0): (80.3, 4.59),
    }
    assert {(p.x, p.y) for p in left if p.name == "GIVT"} == {(65.1, 17.70), (None, 11.02)}
    assert (3.39, 205.96) in {(p.x, p.y) for p in right} and all(p.y is not None for p in right)
    assert in_millions("1.67B") == 1670 and len({(p.name, p.parameters) for p in left}) == len(left)


def test_it_is_drawn(tmp_path):
    left, right = cited_points()
    ours = Point(name="DiGIT + AR", kind="ours", parameters=218.6, x=70.0, y=10.0, ours=True)
    for together in (True, False):
        draw_overview(tmp_path / "fig1.png", [*left, ours], [*right, ours], together=together)
        width, height = Image.open(tmp_path / "fig1.png").size
        assert (width > height) == together or height > 900


@pytest.mark.parametrize("together", [True, False])
def test_no_name_covers_another_or_leaves_its_panel(together):
    left, right = cited_points()
    names = ("DiGIT + AR", "DiGIT + MaskGIT", "DiGIT + AR, large")
    about = dict(kind="ours", parameters=218.6, ours=True)
    left += [Point(name=name, x=70.0 + n, y=10.0 - n, **about) for n, name in enumerate(names)]
    right += [Point(name=name, x=4.7 - n / 9, y=145.0 + n, **about) for n, name in enumerate(names)]
    groups = [(left, right)] if together else [(left[:-3], right[:-3]), (left[-3:], right[-3:])]
    shape = (13, 4.6 * len(groups))
    figure, axes = plt.subplots(len(groups), 2, figsize=shape, squeeze=False, layout="constrained")
    overview(axes, groups)
    figure.set_dpi(110)  # as plots.panels
    figure.draw_without_rendering()
    for panel, points in zip(axes.ravel(), [points for group in groups for points in group], strict=True):
        written = [text for text in panel.texts if text.get_text() != "n/a"]
        assert sorted(text.get_text() for text in written) == sorted(point.name for point in points)
        boxes = [tuple(Text.get_window_extent(text).extents) for text in written]  # without the line to the bubble
        assert not [pair for pair in combinations(boxes, 2) if overlap(*pair) > 0]
        frame = tuple(panel.get_window_extent().extents)
        assert all(covered(box, [], frame) < 1e-6 for box in boxes), "inside the panel"
    plt.close(figure)


def test_classes_are_spread():
    assert chosen_classes(1000) == [0, 166, 333, 500, 666, 833] and chosen_classes(3) == [0, 1, 2]
    assert chosen_classes(0) == []
