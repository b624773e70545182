"""The page in a browser: every part as a person uses it, with mouse and keyboard, at desktop and phone width.

Needs Playwright and a Chromium of the system; is skipped, with the reason, where one is missing. DIGIT_STUDIO_PICTURES
names a folder for screenshots.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from studio_toys import SIZE, ToyJudge, serving, studio_pipeline

from digit.data.shapes import ShapesSource
from digit.studio.app import Studio
from digit.studio.atlas import Atlas
from digit.studio.folders import Folder
from digit.studio.model import Model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
PICTURES = os.environ.get("DIGIT_STUDIO_PICTURES")
PARTS = ("draw", "complete", "tokens", "stability", "judge", "runs")
PATIENCE = 60_000  # ms; a busy machine is slow
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}


@pytest.fixture(scope="module")
def address(studio) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("digit.runs.report.load_judge", ToyJudge)
        yield from serving(studio)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield opened
        opened.close()


class Page:
    """A page with what went wrong in it."""

    def __init__(self, browser, address: str, width: int = 1280, colours: str = "light", **options) -> None:
        self.context = browser.new_context(
            **options,
            viewport={"width": width, "height": 860},
            color_scheme=colours,
            accept_downloads=True,
            reduced_motion="reduce",
        )
        self.page, self.width, self.colours = self.context.new_page(), width, colours
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith(("data:", "blob:")) else self.requests.append(r.url))
        self.address = address
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def open(self, part: str):
        self.page.locator(f"#tabs a[href='#{part}']").click()
        self.page.wait_for_selector(f"#tabs a[href='#{part}'][aria-current]")
        return self.page

    def button(self, name: str, **options):
        return self.page.get_by_role("button", name=name, exact=True, **options)

    def draw(self, num: int = 4) -> None:
        self.open("draw")
        self.button(str(num)).click()
        self.button("Draw").click()
        self.page.wait_for_selector(f".tile:nth-child({num}) img")
        self.page.wait_for_selector("text=Click a seed to keep it")

    def show(self, name: str) -> None:
        if PICTURES:
            path = Path(PICTURES) / f"{name}_{self.width}_{self.colours}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=path, full_page=True)


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    opened = Page(browser, address)
    yield opened
    opened.context.close()
    assert not opened.problems


def test_the_first_page_takes_five_requests_of_this_machine(page):
    page.page.wait_for_selector(".classes .thumb[style]")
    assert len(page.requests) <= 5 and all(url.startswith(page.address) for url in page.requests)


def test_draw_shows_maps_then_pictures_with_seeds(page):
    page.page.get_by_role("button", name="cube", exact=True).click()
    page.page.get_by_label("Seed of the first picture").fill("7")
    page.draw(4)
    page.show("draw")
    captions = page.page.locator(".tile figcaption").all_inner_texts()
    assert [re.sub(r"\s+", " ", text) for text in captions] == [f"cube seed {n}" for n in range(7, 11)]
    lines = page.page.locator(".lines pre").all_inner_texts()
    assert lines[0].startswith("digit sample --from runs/toy --num 4 --seed 7 --labels cube")
    assert "pipe.generate(4, labels=['cube'], seed=7" in lines[1]
    page.button("Token maps").click()
    assert page.page.locator(".gallery.maps .map").first.evaluate("m => m.width") == 4


def test_a_seed_that_is_clicked_gives_that_picture_alone(page):
    page.draw(4)
    third = page.page.locator(".tile:nth-child(3) img").get_attribute("src")
    page.button("use seed 2").click()
    page.button("Draw").click()
    page.page.wait_for_selector("text=1 picture in")
    assert page.page.locator(".tile img").count() == 1
    assert page.page.locator(".tile img").get_attribute("src") == third


def test_settings_show_the_recipes_value_and_go_back_to_it(page):
    row = page.page.locator(".setting").first  # the temperature of the prior
    slider = row.locator("input")
    assert row.locator("output").inner_text() == "1" and row.locator(".recipe").inner_text() == "recipe"
    slider.focus()
    page.page.keyboard.press("ArrowLeft")
    assert row.locator("output").inner_text() == "0.95" and "changed" in row.get_attribute("class")
    page.draw(1)
    assert "--prior.temperature 0.95" in page.page.locator(".lines pre").first.inner_text()
    row.locator(".recipe").click()
    assert row.locator("output").inner_text() == "1" and "changed" not in row.get_attribute("class")


def test_a_choice_shows_the_recipes_value_and_goes_back_to_it(page):
    page.page.get_by_label("Guidance schedule").first.select_option("linear")
    row = page.page.locator(".setting", has_text="Guidance schedule").first
    assert "changed" in row.get_attribute("class")
    assert row.locator("option").all_inner_texts() == ["constant (recipe)", "linear", "cosine"]
    page.draw(1)
    assert "--prior.cfg_schedule linear" in page.page.locator(".lines pre").first.inner_text()
    page.button("Guidance schedule: back to the recipe's constant").click()
    assert row.locator("select").input_value() == "constant" and "changed" not in row.get_attribute("class")
    assert row.locator(".recipe").inner_text() == "guidance is off"  # and so it would change nothing
    assert page.page.get_by_label("Guidance schedule").last.is_disabled()  # no dropout in its training


def test_stop_ends_the_work(page, studio, monkeypatch):
    def endless(self, job, request):
        while True:
            job.emit("step", stage="prior", first=0, tokens=[[0] * 16])
            time.sleep(0.02)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "draw", endless)
        page.button("Draw").click()
        page.button("Stop").click()
        page.page.wait_for_selector("text=stopped")
    page.draw(1)  # and the next one works


def test_a_saved_picture_brings_its_settings_back(page, tmp_path):
    page.page.get_by_role("button", name="torus", exact=True).click()
    page.page.get_by_label("Seed of the first picture").fill("31")
    page.draw(1)
    src = page.page.locator(".tile img").get_attribute("src")
    with page.page.expect_download() as saved:
        page.page.get_by_role("button", name="Save: torus, seed 31").click()
    path = tmp_path / "saved.png"
    saved.value.save_as(path)
    page.page.get_by_label("Seed of the first picture").fill("0")
    page.button("All").click()
    drop(page, path)
    page.page.wait_for_selector("text=Its settings are back: Draw makes the same picture")
    assert page.page.get_by_label("Seed of the first picture").input_value() == "31"
    page.button("Draw").click()
    page.page.wait_for_selector("text=1 picture in")
    assert page.page.locator(".tile img").get_attribute("src") == src


def drop(page: Page, path: Path) -> None:
    """Drop a file onto the page."""
    import base64

    data = base64.b64encode(path.read_bytes()).decode()
    handle = page.page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, path.name],
    )
    page.page.dispatch_event("body", "drop", {"dataTransfer": handle})


def test_a_choice_made_while_the_first_picture_arrives_stays(page, monkeypatch):
    """The part asks for a picture to begin with; who clicks before it is there must not lose what the click opened."""
    training_pictures = Model.training_pictures

    def slow(self, job, start, num):
        time.sleep(0.5 if num == 1 else 0)
        training_pictures(self, job, start, num)

    monkeypatch.setattr(Model, "training_pictures", slow)
    page.open("complete")
    page.button("From the training data").click()
    page.page.wait_for_selector(".strip button")
    page.page.wait_for_selector(".cells button")  # the first picture has come meanwhile
    page.page.locator(".strip button").nth(3).click()
    assert "training picture" in page.page.locator(".picker").inner_text()


def test_complete_keeps_what_is_kept(page):
    page.draw(1)
    page.page.get_by_role("button", name=re.compile("^Complete: ")).click()
    page.page.wait_for_selector(".cells button")
    cells = page.page.locator(".cells button")
    assert cells.count() == 16
    page.button("Border").click()
    page.page.wait_for_selector("text=12 of 16 cells kept")
    cells.nth(0).click()  # the mouse
    page.page.wait_for_selector("text=11 of 16 cells kept")
    cells.nth(0).focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Space")  # and the keyboard
    page.page.wait_for_selector("text=10 of 16 cells kept")
    page.button("Complete").click()
    page.page.wait_for_selector(".tile:nth-child(4) img")
    page.show("complete")
    assert "fill_cells" in page.page.locator(".lines pre").last.inner_text()
    page.button("Variations").click()
    page.page.wait_for_selector("img[alt='variation 4']")


def test_a_token_shows_where_it_stands_and_can_be_swapped(page):
    page.open("tokens")
    page.page.wait_for_selector(".patches .thumb")
    assert page.page.locator(".board .cells").count() == 2
    cell = page.page.get_by_role("button", name=re.compile("^row 2, column 2: token")).first
    cell.hover()
    page.page.wait_for_selector("text=in this picture")
    assert page.page.locator("button.same").count() >= 1
    cell.click()
    page.page.wait_for_selector(".codes button")
    page.page.locator(".codes button").first.click()
    page.page.wait_for_selector("text=1 token changed")
    page.show("tokens")


def test_noise_lights_up_tokens_and_the_curve_is_beneath(page):
    page.open("stability")
    page.page.wait_for_selector("svg.chart polyline")
    counts = page.page.locator(".count")
    page.page.get_by_label(re.compile("^Noise")).focus()
    page.page.keyboard.press("End")
    page.page.wait_for_selector("output:text-is('-5 dB')")
    page.page.wait_for_selector(".cells i.changed")
    page.show("stability")
    assert counts.count() == 2 and "digit stability shapes" in page.page.locator(".lines pre").first.inner_text()


def test_the_judge_shows_neighbours_with_their_scale(page):
    page.open("judge")
    page.button("Draw 16 and judge them").click()
    page.page.wait_for_selector(".judged article:nth-child(16)")
    page.show("judge")
    assert page.page.locator(".judged article").first.locator("img").count() == 4
    assert "Recognised" in page.page.locator(".facts").inner_text()


def test_the_judge_stops_in_the_middle(page, monkeypatch):
    def endless(self):
        done = 0
        while True:
            done += 1
            time.sleep(0.01)
            yield done, 10**6

    with monkeypatch.context() as patch:
        patch.setattr(Atlas, "judge_all", endless)
        page.open("judge")
        page.button("Draw 16 and judge them").click()
        page.page.wait_for_selector("text=the judge looks at training pictures")
        page.button("Stop").click()
        page.page.wait_for_selector("text=stopped")
        waiting = "async () => (await (await fetch('/api/waiting')).json()).waiting"
        page.page.wait_for_function(f"async () => await ({waiting})() === 0")
    page.button("Judge the 16 pictures drawn").click()
    page.page.wait_for_selector(".judged article:nth-child(16)")


def test_runs_tell_their_time_and_what_failed(page, studio, monkeypatch):
    [run, *_] = studio.folder.describe_all()
    told = {"at_work": True, "current": "prior", "left": 130.0, "done": False, "message": "loss jumped"}
    told |= {"whole": {"seconds": 3700.0, "unknown": ["renderer_pixels"]}}
    monkeypatch.setattr(studio.folder, "describe_all", lambda: [run | told])
    failed = [{"name": "new", "message": "no such path: photos", "ended": 2}]
    monkeypatch.setattr(studio.folder, "starting", lambda: failed)
    page.open("runs")
    card = page.page.locator(".run-card")
    card.wait_for()
    text = "prior: about 2 min 10 s left; the whole training: at least 1 h 1 min, beside renderer_pixels"
    assert text in card.inner_text() and "loss jumped" in card.inner_text()
    assert "no such path: photos" in page.page.get_by_role("article", name="new").inner_text()


def test_runs_are_compared(page):
    page.open("runs")
    page.page.get_by_label("compare").first.check()
    page.page.get_by_label("compare").last.check()
    page.page.wait_for_selector("text=prior_training.learning_rate")
    page.show("runs")
    assert page.page.locator("svg.chart").count() >= 2


def test_all_parts_are_reached_by_the_keyboard(page):
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    for part in PARTS:
        page.page.locator(f"#tabs a[href='#{part}']").focus()
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector(f"#tabs a[href='#{part}'][aria-current]")
        page.page.wait_for_selector(f"main h2:text-is('{part.capitalize()}')")


@pytest.mark.parametrize(("width", "colours"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_no_part_breaks_a_rule_of_accessibility_or_its_width(browser, address, width, colours):
    opened = Page(browser, address, width, colours, bypass_csp=True)  # axe is a script from outside
    for part in PARTS:
        opened.open(part)
        opened.page.wait_for_selector("main h2")
        if part in ("complete", "tokens"):
            opened.page.wait_for_selector(".cells button")
        if part == "stability":
            opened.page.wait_for_selector("svg.chart")
        if part == "runs":
            opened.page.wait_for_selector(".run-card")
        found = axe.Axe().run(opened.page, options=RULES)
        assert found.violations_count == 0, f"{part}: {found.generate_report()}"
        wide = opened.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{part} is {wide} px wider than the screen"
        opened.show(f"{part}_page")
    opened.context.close()
    assert not opened.problems


def test_long_words_do_not_break_the_page(browser, address, studio, monkeypatch):
    words = [f"Donaudampfschifffahrtsgesellschaftskapitänsmütze{k}" for k in range(10)]
    monkeypatch.setattr(studio.model.pipe, "classes", words)
    opened = Page(browser, address, 390)
    opened.page.get_by_role("button", name=words[3], exact=True).click()
    opened.draw(4)
    assert opened.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    opened.show("long_words")
    opened.context.close()
    assert not opened.problems


# ---------------------------------------------------------------- other kinds of pipelines


def opened_on(browser, kind: str, source=None, **changes) -> Iterator[Page]:
    studio = Studio(Model(studio_pipeline(kind, **changes), "toy", source), Folder(None))
    for address in serving(studio):
        opened = Page(browser, address)
        yield opened
        opened.context.close()
        assert not opened.problems
    studio.close()


def test_a_renderer_straight_to_pixels(browser):
    """Draw, complete and tokens work without VQ tokens, and the page says what the renderer does not have."""
    for page in opened_on(browser, "pixels", ShapesSource(num=20, size=SIZE)):
        page.draw(4)
        assert "then all its pixels at once" in page.page.locator(".lede").inner_text()
        assert "it has no settings" in page.page.locator("details").last.inner_text()
        page.button("Complete: cube, seed 1").click()
        page.page.wait_for_selector(".cells button")
        page.button("Complete").click()
        page.page.wait_for_selector(".tile:nth-child(4) img")
        page.button("Variations").click()
        page.page.wait_for_selector("img[alt='variation 4']")
        page.open("tokens")
        page.page.wait_for_selector(".patches .thumb")
        assert page.page.locator(".board .cells").count() == 1
        assert "This run has no VQ tokens" in page.page.locator(".lede").inner_text()
        page.page.locator(".codes button").first.click()
        page.page.wait_for_selector("text=1 token changed")
        page.open("stability")
        page.page.wait_for_selector("svg.chart polyline")
        page.open("runs")
        page.page.wait_for_selector("text=This studio has no folder of runs")


def test_a_renderer_without_noise_varies_half_of_the_tokens(browser):
    for page in opened_on(browser, "pixels", noise_channels=0):
        page.draw(1)
        page.open("complete")
        page.page.wait_for_selector("text=Variations keep 50% of the discriminative tokens and sample the others")
        page.page.wait_for_selector(".cells button")
        page.button("Variations").click()
        page.page.wait_for_selector("img[alt='variation 4']")


def test_a_masked_renderer_has_steps_and_an_order(browser):
    for page in opened_on(browser, "masked"):
        page.page.get_by_label("Order").select_option("halton")
        row = page.page.locator(".setting", has_text="Choice temperature")
        assert row.locator(".recipe").inner_text() == "not used by halton"
        page.draw(1)
        assert "--renderer.order halton" in page.page.locator(".lines pre").first.inner_text()


def test_vq_tokens_alone(browser):
    for page in opened_on(browser, "vq", ShapesSource(num=20, size=SIZE)):
        page.draw(1)
        page.open("tokens")
        page.page.wait_for_selector("text=A VQ code stands for the look of a few pixels")
        assert "no discriminative ones" in page.page.locator(".lede").inner_text()
