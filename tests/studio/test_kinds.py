"""Pipelines of other kinds: a masked renderer, one straight to pixels, VQ tokens alone, parts that are missing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from starlette.testclient import TestClient
from studio_toys import SIZE, ToyJudge, events, studio_pipeline
from tiny import SHAPES, pixel_recipe

from digit.data.shapes import ShapesSource
from digit.models.sequence import SequenceModel
from digit.pipeline.cells import fill_cells
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.variations import vary
from digit.studio.app import Studio, make_app
from digit.studio.folders import Folder
from digit.studio.model import Model
from digit.studio.pictures import data_url, png, read_data_url


def pixels(url: str) -> torch.Tensor:
    return read_data_url(url, SIZE)


def client_of(pipe: DigitPipeline, source=None):
    studio = Studio(Model(pipe, "toy", source), Folder(None))
    yield TestClient(make_app(studio), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    studio.close()


@pytest.fixture(scope="module")
def pipe() -> DigitPipeline:
    return studio_pipeline("pixels")


@pytest.fixture(scope="module")
def client(pipe):
    yield from client_of(pipe, ShapesSource(num=60, size=SIZE))


@pytest.fixture(scope="module")
def masked():
    yield from client_of(studio_pipeline("masked"))


@pytest.fixture(scope="module")
def vq_only():
    yield from client_of(studio_pipeline("vq"), ShapesSource(num=60, size=SIZE))


KEEP = [[True] * 4, [True, False, False, True], [True, False, False, True], [True] * 4]


# ---------------------------------------------------------------- straight to pixels


def test_about_says_what_there_is(client):
    about = client.get("/api/about").json()
    assert about["pixels"] and about["varies"] and about["kinds"]["renderer"] == "pixels" and about["cells"] == [4, 4]
    assert list(about["tokenizers"]) == ["discriminative"] and about["settings"]["renderer"] == {}
    assert set(about["missing"]) == {"runs"}  # this studio has no folder; all other parts work


def test_pictures_are_those_of_generate(client, pipe):
    found = events(client.post("/api/draw", json={"num": 3, "seed": 5, "labels": [2], "prior": {"top_k": 3}}))
    expected = pipe.generate(3, ClassPositions([2]), seed=5, batch_size=16, prior={"top_k": 3})
    assert torch.equal(torch.stack([pixels(p["image"]) for p in found.only("picture")]), expected)
    assert {step["stage"] for step in found.only("step")} == {"prior"}
    assert all(list(p["tokens"]) == ["discriminative"] for p in found.only("picture"))


def test_a_setting_of_the_renderer_is_refused(client):
    answer = client.post("/api/draw", json={"renderer": {"temperature": 0.5}})
    assert answer.status_code == 400 and "the renderer of this run takes nothing" in answer.json()["error"]


def test_completion_keeps_tokens_and_pixels(client, pipe):
    url = events(client.post("/api/draw", json={"num": 1, "seed": 5})).only("picture")[0]["image"]
    found = events(client.post("/api/complete", json={"picture": url, "keep": KEEP, "num": 2, "seed": 3}))
    expected = fill_cells(pipe, pixels(url)[None], torch.tensor(KEEP), num=2, seed=3, batch_size=16)
    pictures = found.only("picture")
    assert torch.equal(torch.stack([pixels(p["image"]) for p in pictures]), expected.blended)
    mask = torch.tensor(KEEP).repeat_interleave(SIZE // 4, 0).repeat_interleave(SIZE // 4, 1)
    assert all(torch.equal(pixels(p["image"])[:, mask], pixels(url)[:, mask]) for p in pictures)


def test_variations_differ_by_the_renderers_noise(client):
    url = events(client.post("/api/draw", json={"num": 1, "seed": 5})).only("picture")[0]["image"]
    first, second = events(client.post("/api/vary", json={"picture": url, "num": 2})).only("picture")
    assert first["tokens"] == second["tokens"] and first["image"] != second["image"]


def test_without_noise_variations_keep_half_of_the_tokens():
    model = Model(studio_pipeline("pixels", noise_channels=0), "toy")
    about = model.about()
    assert not about["varies"] and about["kept_by_variations"] == 0.5
    for client in client_of(model.pipe, ShapesSource(num=60, size=SIZE)):
        url = events(client.post("/api/draw", json={"num": 1, "seed": 5})).only("picture")[0]["image"]
        found = events(client.post("/api/vary", json={"picture": url, "num": 2, "seed": 7}))
        pictures, own = found.only("picture"), model.pipe.tokenizer.encode(pixels(url)[None])
        expected = vary(model.pipe, pixels(url)[None], num=2, seed=7, batch_size=16)
        assert torch.equal(torch.stack([pixels(p["image"]) for p in pictures]), expected)
        for picture in pictures:
            same = (torch.tensor(picture["tokens"]["discriminative"]) == own[0]).float().mean()
            assert 0.5 <= same < 1 and picture["seed"] == 7 + picture["index"]
        command = found.only("start")[0]["commands"]["shell"]
        assert command.startswith("digit vary picture.png --from toy --each 2 --seed 7")


def test_tokens_swaps_noise_and_colours(client, pipe):
    url = events(client.post("/api/draw", json={"num": 1, "seed": 5})).only("picture")[0]["image"]
    found = events(client.post("/api/encode", json={"picture": url}))
    [told] = found.only("tokens")
    assert list(told["tokens"]) == ["discriminative"] and "pipe.vq" not in told["commands"]["python"]
    assert [r["tokenizer"] for r in found.only("rebuilt")] == ["discriminative"]
    tokens = [k % 7 for k in range(16)]
    [picture] = events(client.post("/api/render", json={"tokens": tokens, "seed": 9})).only("picture")
    assert torch.equal(pixels(picture["image"]), pipe.render([tokens], 9, batch_size=16)[0])
    [noisy] = events(client.post("/api/noise", json={"picture": url, "snr": 12.0})).only("noisy")
    assert list(noisy["tokens"]) == ["discriminative"]
    [palettes] = events(client.get("/api/palettes")).only("palettes")
    assert list(palettes) == ["discriminative"]
    assert list(events(client.get("/api/curve")).only("curve")[0]["curves"]) == ["discriminative"]


def test_samples_are_judged(client, monkeypatch):
    monkeypatch.setattr("digit.runs.report.load_judge", ToyJudge)
    urls = [p["image"] for p in events(client.post("/api/draw", json={"num": 3})).only("picture")]
    [judged] = events(client.post("/api/judge", json={"pictures": urls, "labels": [0, 1, 2]})).only("judged")
    assert len(judged["results"]) == 3


def test_a_run_of_a_renderer_straight_to_pixels(tmp_path):
    """From `digit fit` to the page: its stages are told, and it draws and completes."""
    from digit.runs.fit import Run, fit
    from digit.studio.serve import open_studio

    pipe = fit(Run(pixel_recipe(), SHAPES, tmp_path / "run"))
    studio, _ = open_studio(pipe, tmp_path / "run", data=SHAPES)
    try:
        client = TestClient(make_app(studio), base_url="http://127.0.0.1:8000")
        assert client.get("/api/about").json()["missing"] == {}
        [run] = client.get("/api/runs").json()["runs"]
        stages = {stage["name"]: stage["done"] for stage in run["stages"]}
        assert stages["renderer_pixels"] and run["done"] and run["whole"] is None
        [picture] = events(client.post("/api/draw", json={"num": 1})).only("picture")
        body = {"picture": picture["image"], "keep": [[True, False], [False, True]], "num": 1}
        assert len(events(client.post("/api/complete", json=body)).only("picture")) == 1
        assert "renderer_pixels" in client.get("/api/runs/run/curves").json()
    finally:
        studio.close()


def test_the_pictures_of_a_limited_run_are_found(tmp_path):
    from PIL import Image

    from digit.data.images import open_source
    from digit.runs.fit import Run
    from digit.studio.serve import find_data

    for i in range(6):
        (tmp_path / f"photos/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / f"photos/{'ab'[i % 2]}/{i}.png")
    photos, out = str(tmp_path / "photos"), tmp_path / "run"
    Run(pixel_recipe(), open_source(photos).limit(4), out)
    source, spec, note = find_data(out, None)
    assert len(source) == 4 and spec == photos and not note
    assert len(find_data(out, photos)[0]) == 4
    other, _, note = find_data(out, SHAPES)
    assert len(other) == 24 and f"{SHAPES} holds other pictures than this run was trained on" in note
    source, _, note = find_data(tmp_path, None)
    assert source is None and "no training pictures are known" in note


# ---------------------------------------------------------------- masked


def test_a_masked_renderer_takes_steps_and_order(masked):
    about = masked.get("/api/about").json()
    assert about["settings"]["renderer"]["order"] == "confidence" and about["choices"]["order"] == [
        "confidence",
        "halton",
    ]
    settings = {"order": "halton", "num_steps": 4}
    found = events(masked.post("/api/draw", json={"num": 1, "seed": 2, "renderer": settings}))
    expected = studio_pipeline("masked").generate(1, seed=2, batch_size=16, renderer=settings)
    assert torch.equal(pixels(found.only("picture")[0]["image"]), expected[0])
    assert "--renderer.order halton" in found.only("start")[0]["commands"]["shell"]
    plain = events(masked.post("/api/draw", json={"num": 1, "seed": 2, "renderer": {"num_steps": 4}}))
    assert plain.only("picture")[0]["image"] != found.only("picture")[0]["image"]


# ---------------------------------------------------------------- parts that are missing


def test_vq_tokens_alone(vq_only):
    about = vq_only.get("/api/about").json()
    assert list(about["tokenizers"]) == ["vq"] and about["cells"] == [8, 8] and set(about["missing"]) == {"runs"}
    found = events(vq_only.post("/api/draw", json={"num": 1}))
    [picture] = found.only("picture")
    told = events(vq_only.post("/api/encode", json={"picture": picture["image"]})).only("tokens")[0]
    assert "pipe.tokenizer" not in told["commands"]["python"]
    keep = [[True] * 8] * 4 + [[False] * 8] * 4
    body = {"picture": picture["image"], "keep": keep, "num": 1, "label": 3}
    assert len(events(vq_only.post("/api/complete", json=body)).only("picture")) == 1
    for path, body in (("/api/vary", {"picture": picture["image"]}), ("/api/render", {"tokens": [0] * 16})):
        assert "this needs tokenizer" in events(vq_only.post(path, json=body))[-1][1]["text"]


@pytest.mark.parametrize(
    ("without", "nothing"),
    [
        ("prior", {"draw", "complete", "judge", "runs"}),
        ("renderer", {"draw", "complete", "judge", "runs"}),
        ("tokenizer", {"complete", "judge", "runs"}),
        ("vq", {"draw", "complete", "judge", "runs"}),
    ],
)
def test_a_part_that_has_nothing_to_show_says_why(without, nothing):
    """A pipeline of which one part is missing: the page comes up all the same."""
    pipe = studio_pipeline()
    setattr(pipe, without, None)
    for client in client_of(pipe):
        missing = client.get("/api/about").json()["missing"]
        assert set(missing) == nothing and all(reason.endswith(".") for reason in missing.values())
        answer = client.post("/api/draw", json={"num": 1})
        assert (answer.status_code == 200) == ("draw" not in nothing)


def test_tokenizers_alone_show_tokens():
    pipe = studio_pipeline()
    pipe.prior = pipe.renderer = None
    for client in client_of(pipe, ShapesSource(num=20, size=SIZE)):
        assert set(client.get("/api/about").json()["missing"]) == {"draw", "complete", "judge", "runs"}
        [picture] = events(client.get("/api/data?num=1")).only("picture")
        found = events(client.post("/api/encode", json={"picture": picture["image"]}))
        assert found.only("tokens") and [r["tokenizer"] for r in found.only("rebuilt")] == ["vq"]
        assert events(client.get("/api/patches/2")).only("patches")


def test_unfinished_pictures_take_the_cell_before_with_all_its_levels():
    codes = torch.tensor([[5, 9, -1, -1, -1, -1], [5, 9, 6, -1, -1, -1]])
    vqgan = SimpleNamespace(decode_tokens=lambda tokens: tokens)
    vq = SimpleNamespace(num_levels=2, vqgan=vqgan, to_pixels=lambda tokens: tokens)
    model = SimpleNamespace(pipe=SimpleNamespace(vq=vq, device="cpu"))
    assert Model.unfinished(model, codes).tolist() == [[5, 9] * 3, [5, 9] * 3]  # a cell is known with its last level
    vq.num_levels = 1
    assert Model.unfinished(model, codes).tolist() == [[5, 9, 9, 9, 9, 9], [5, 9, 6, 6, 6, 6]]


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_picture_is_read_where_no_label_is_ever_hidden(num_classes):
    """-1, no class, is no label of a prior without classes, or whose every training image had one."""
    toy = studio_pipeline()
    prior = SequenceModel(replace(toy.prior.cfg, num_classes=num_classes, label_dropout=0.0))
    parts = dict(tokenizer=toy.tokenizer, vq=toy.vq, renderer=toy.renderer, preprocess=toy.preprocess)
    pipe = DigitPipeline(prior=prior, classes=toy.classes[:num_classes], **parts)
    for client in client_of(pipe):
        url = data_url(png(toy.generate(1, seed=1)[0]))
        found = events(client.post("/api/encode", json={"picture": url}))
        assert [event["tokenizer"] for event in found.only("rebuilt")] == ["vq", "discriminative"]
        tokens = found.only("tokens")[0]
        assert tokens["label"] == -1
        drawn = events(client.post("/api/render", json={"tokens": tokens["tokens"]["discriminative"], "label": -1}))
        assert len(drawn.only("picture")) == 1
