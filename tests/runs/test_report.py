"""The report of a run: its files, a page that needs nothing else, and every part where it belongs."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from tiny import SHAPES, tiny_recipe

from digit.runs.fit import Run, fit
from digit.runs.page import bars, chart, document
from digit.runs.report import write_report
from digit.runtime.lock import set_command

EMPTY = {"meta", "img", "br", "line", "path"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed in another order than it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in EMPTY and tag != "p":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY and tag != "p":
            assert self.open.pop() == tag


def balanced(text: str) -> bool:
    parser = Balanced()
    parser.feed(text)
    return not parser.open


@pytest.fixture(scope="module")
def guided(tmp_path_factory, few_scenes):
    """A tiny run that was trained for guidance, its page, and what it measured."""
    set_command(f"digit fit {SHAPES} --out run")
    recipe = tiny_recipe()
    recipe = replace(
        recipe, prior=replace(recipe.prior, label_dropout=0.1), renderer=replace(recipe.renderer, prefix_dropout=0.1),
        validation_fraction=0.25,
    )  # fmt: skip
    run = Run(recipe, SHAPES, tmp_path_factory.mktemp("guided") / "run")
    page = write_report(run, fit(run))
    return run.out, page.read_text(), json.loads((run.out / "metrics.json").read_text())


def test_the_page_is_one_file_for_every_screen(guided):
    _, text, _ = guided
    assert balanced(text) and "width=device-width" in text and "prefers-color-scheme: dark" in text
    sources = re.findall(r'src="([^"]{0,40})', text)
    assert len(sources) > 100 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://", text) and set(re.findall(r'href="([^"]*)"', text)) == {"samples.png"}


def test_both_ways_are_shown_and_measured(guided):
    out, text, metrics = guided
    assert (out / "samples_with_guidance.png").is_file() and not (out / "samples_without_guidance.png").exists()
    assert "without guidance" in text and metrics["guidance"]["default"] == "without guidance"
    assert {"samples", "other_way"} <= metrics["scale"]["sets"].keys() and "recognised_other_way" in metrics


def test_every_part_has_its_heading(guided):
    _, text, _ = guided
    headings = re.findall(r"<h2>([^<]*)</h2>", text)
    wanted = ["Samples", "How far from real pictures", "Recognised by class", "Learnt by heart?"]
    wanted += ["What the tokens keep of real pictures", "Training", "Time", "What to do next", "In Python", "Parts"]
    assert headings == wanted


def test_times_and_commands(guided):
    out, text, metrics = guided
    assert {"vqgan", "prior", "renderer", "report"} <= metrics["stage_seconds"].keys()
    assert f"digit sample --from {out} --num 64" in text and f"digit export {out}" in text
    assert f"digit complete {SHAPES} --from {out}" in text


def test_a_run_of_unlabelled_pictures(tmp_path, few_scenes):
    run = Run(tiny_recipe(class_conditional=False), SHAPES, tmp_path / "run")
    text = write_report(run, fit(run)).read_text()
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert balanced(text) and "recognised" not in metrics and metrics["guidance"] is None
    assert "Recognised by class" not in text and "no classes" in text


def test_previews_are_shown_where_there_are_some(run, few_scenes):
    from PIL import Image

    (run.out / "previews").mkdir(exist_ok=True)
    for name in ("prior_00000100", "prior_growth"):
        Image.new("RGB", (64, 16)).save(run.out / "previews" / f"{name}.png")
    text = write_report(run, fit(run)).read_text()
    assert "How it grew" in text and 'src="previews' not in text and 'href="previews/prior_00000100.png"' in text


def test_charts_and_bars():
    assert chart({}, "prior", "nats") == ""
    drawn = chart({"training": [(0, 5.0), (10, 3.0), (20, 2.0)], "held-out pictures": [(10, 3.5)]}, "prior", "nats")
    assert drawn.count("<path") == 2 and "class=held" in drawn and balanced(drawn)
    flat = chart({"training": [(5, 1.0)]}, "prior", "nats")
    assert "nan" not in flat and balanced(flat)
    shown = bars([("a <b>", 0.5, "50%", ""), ("c", 2.0, "2", "real")], most=1.0, marks={"c": 0.25})
    assert "a &lt;b&gt;" in shown and "width:50.00%" in shown and "width:100.00%" in shown and "left:25.00%" in shown
    assert balanced(document("t", [shown]))
