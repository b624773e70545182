"""Figure 1 draws the paper's points and ours, also those with one value alone."""

from PIL import Image

from digit.reproduce.pictures import Point, chosen_classes, cited_points, draw_overview, in_millions


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


def test_classes_are_spread():
    assert chosen_classes(1000) == [0, 166, 333, 500, 666, 833] and chosen_classes(3) == [0, 1, 2]
    assert chosen_classes(0) == []
