"""The studio's server: every address, what it gives, and what it refuses."""

import base64
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from studio_toys import SIZE, VQ_CODES, ToyJudge, events

from digit.metrics.stability import StabilityConfig, add_noise
from digit.pipeline.cells import fill_cells
from digit.pipeline.labels import ClassPositions
from digit.studio.app import STATIC
from digit.studio.jobs import Job
from digit.studio.pictures import MAX_UPLOAD_PIXELS, data_url, png, read_data_url, settings_in


def pixels(url: str) -> torch.Tensor:
    return read_data_url(url, SIZE)


def bytes_of(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def a_picture(size=(50, 40), kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, format=kind, **options)
    return out.getvalue()


# ---------------------------------------------------------------- page


def test_the_page_is_small_and_needs_nothing_from_elsewhere(client):
    first = ["/", "/style.css", "/app.js", "/api/about", "/api/examples"]  # what a browser asks for at the start
    answers = [client.get(path) for path in first]
    assert all(answer.status_code == 200 for answer in answers)
    assert sum(len(answer.content) for answer in answers) <= 300_000
    text = "".join(entry.read_text(encoding="utf-8") for entry in STATIC.iterdir())
    outside = [line for line in text.splitlines() if "http" in line.replace("http://www.w3.org/", "")]
    assert not outside, "the page names an address outside of this machine"


def test_headers_keep_the_browser_from_doing_more(client):
    headers = client.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert client.get("/api/about").headers["content-security-policy"] == headers["content-security-policy"]
    assert "server" not in headers


def test_about_tells_classes_settings_and_grids(client, pipe):
    about = client.get("/api/about").json()
    assert about["classes"] == pipe.classes and about["size"] == SIZE and about["cells"] == [4, 4]
    assert about["tokenizers"] == {
        "discriminative": {"grid": [4, 4], "codes": 7},
        "vq": {"grid": [8, 8], "codes": VQ_CODES},
    }
    filters = {"temperature": 1.0, "top_k": 200, "top_p": 1.0, "cfg_scale": 1.0, "cfg_schedule": "constant"}
    assert about["settings"]["prior"] == filters and about["missing"] == {}
    assert about["choices"]["cfg_schedule"] == ["constant", "linear", "cosine"]
    assert about["guidance"] == {"prior": True, "renderer": False}
    assert "num_steps" not in about["settings"]["renderer"]  # a setting of masked models


# ---------------------------------------------------------------- draw


def test_pictures_are_those_of_generate(client, pipe):
    body = {"num": 5, "seed": 11, "labels": [2, 7], "prior": {"top_k": 3, "cfg_scale": 2.0}}
    found = events(client.post("/api/draw", json=body))
    pictures = found.only("picture")
    expected = pipe.generate(5, ClassPositions([2, 7]), seed=11, batch_size=16, prior={"top_k": 3, "cfg_scale": 2.0})
    assert [p["index"] for p in pictures] == list(range(5)) and [p["seed"] for p in pictures] == list(range(11, 16))
    assert [p["name"] for p in pictures] == [pipe.classes[k] for k in (2, 7, 2, 7, 2)]
    assert torch.equal(torch.stack([pixels(p["image"]) for p in pictures]), expected)
    assert found[-1] == ("done", {})


def test_a_picture_depends_on_its_seed_and_not_on_the_count(client):
    many = events(client.post("/api/draw", json={"num": 20, "seed": 3, "labels": [1]})).only("picture")
    one = events(client.post("/api/draw", json={"num": 1, "seed": 21, "labels": [1]})).only("picture")
    assert bytes_of(many[18]["image"]) == bytes_of(one[0]["image"])


def test_the_commands_that_are_shown_make_the_same_pictures(client, pipe):
    body = {"num": 2, "seed": 4, "labels": [3], "renderer": {"temperature": 0.5}}
    found = events(client.post("/api/draw", json=body))
    lines = found.only("start")[0]["commands"]
    assert lines["shell"] == (
        "digit sample --from runs/toy --num 2 --seed 4 --labels cone --batch_size 16 --renderer.temperature 0.5 "
        "--out samples"
    )
    names = {"pipe": pipe}
    exec(lines["python"].splitlines()[-1], names)
    shown = torch.stack([pixels(p["image"]) for p in found.only("picture")])
    assert torch.equal(names["images"], shown)


def test_token_maps_come_before_pixels_and_grow(client):
    found = events(client.post("/api/draw", json={"num": 2, "seed": 0}))
    kinds = [kind for kind, _ in found]
    steps = found.only("step")
    assert kinds.index("step") < kinds.index("picture")
    assert {s["stage"] for s in steps} >= {"renderer"}
    for step in steps:
        length = {"prior": 16, "renderer": 64}[step["stage"]]
        assert all(len(row) == length for row in step["tokens"])
    assert all(t >= 0 for row in steps[-1]["tokens"] for t in row)


def test_settings_come_back_from_the_png(client):
    body = {"num": 1, "seed": 8, "labels": [4], "prior": {"top_p": 0.4}, "renderer": {"temperature": 0.7}}
    first = events(client.post("/api/draw", json=body)).only("picture")[0]
    back = client.post("/api/picture", content=bytes_of(first["image"])).json()
    assert back["same_model"] and torch.equal(pixels(back["image"]), pixels(first["image"]))
    found = back["settings"]
    again = {stage: {k: v for k, v in found[stage].items() if k != "cfg_scale"} for stage in ("prior", "renderer")}
    body = {"num": 1, "seed": found["seed"], "labels": [found["label"]], **again}
    assert events(client.post("/api/draw", json=body)).only("picture")[0]["image"] == first["image"]


def test_guidance_that_grows_is_that_of_generate(client, pipe):
    settings = {"cfg_scale": 4.0, "cfg_schedule": "linear"}
    found = events(client.post("/api/draw", json={"num": 2, "seed": 4, "labels": [3], "prior": settings}))
    expected = pipe.generate(2, ClassPositions([3]), seed=4, batch_size=16, prior=settings)
    assert torch.equal(torch.stack([pixels(p["image"]) for p in found.only("picture")]), expected)
    assert "--prior.cfg_schedule linear" in found.only("start")[0]["commands"]["shell"]
    back = client.post("/api/picture", content=bytes_of(found.only("picture")[0]["image"])).json()
    assert back["settings"]["prior"]["cfg_schedule"] == "linear"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prior": {"cfg_schedule": 1}}, "cfg_schedule"),
        ({"prior": {"cfg_schedule": "x" * 99}}, "cfg_schedule"),
        ({"renderer": {"order": "halton"}}, "order is given"),
        ({"num": 0}, "num"),
        ({"num": 65}, "num"),
        ({"num": 4.5}, "num"),
        ({"num": "4"}, "num"),
        ({"num": True}, "num"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**60}, "seed"),
        ({"labels": [10]}, "label 10 is out of range"),
        ({"labels": ["cube"]}, "labels"),
        ({"num": 1, "labels": [1, 2]}, "2 labels for 1 pictures"),
        ({"prior": {"top_p": 0}}, "top_p"),
        ({"prior": {"temperature": -1}}, "temperature"),
        ({"prior": {"num_steps": 3}}, "num_steps is given"),
        ({"prior": {"top_k": 3, "tok_p": 1}}, "tok_p"),
        ({"renderer": None}, "renderer"),
        ({"run": "/etc"}, "run"),
        ([], "the request"),
        ("draw", "the request"),
    ],
)
def test_mistakes_are_named_in_one_line(client, body, said):
    answer = client.post("/api/draw", json=body)
    assert answer.status_code == 400 and said in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_an_unknown_choice_is_named(client, unchecked):
    answer = client.post("/api/draw", json={"prior": {"cfg_schedule": "sine"}})
    assert answer.status_code == 400 and "it must be constant or linear or cosine" in answer.json()["error"]


def test_guidance_of_a_stage_without_dropout_is_refused_in_the_stream(client):
    found = events(client.post("/api/draw", json={"num": 1, "renderer": {"cfg_scale": 2.0}}))
    assert found[-1][0] == "error" and "trained without label_dropout" in found[-1][1]["text"]


# ---------------------------------------------------------------- complete


KEEP = [[True, True, False, True], [True, False, False, True], [True, True, True, True], [False, False, True, True]]


def test_kept_cells_are_kept_exactly(client, pipe, picture):
    found = events(client.post("/api/complete", json={"picture": picture, "keep": KEEP, "num": 3, "seed": 2}))
    proposals = found.only("picture")
    image, keep = pixels(picture), torch.tensor(KEEP)
    mask = keep.repeat_interleave(SIZE // 4, 0).repeat_interleave(SIZE // 4, 1)
    for proposal in proposals:
        assert torch.equal(pixels(proposal["image"])[:, mask], image[:, mask])
    expected = fill_cells(pipe, image[None], keep, num=3, seed=2, batch_size=16)
    assert torch.equal(torch.stack([pixels(p["decoded"]) for p in proposals]), expected.images)
    fine = keep.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    assert (expected.vq[:, fine] == pipe.vq.encode(image[None])[:, fine]).all()


def test_whole_rows_have_a_command_line_and_equal_complete(client, pipe, picture):
    keep = [[True] * 4] * 2 + [[False] * 4] * 2
    found = events(client.post("/api/complete", json={"picture": picture, "keep": keep, "num": 1, "label": 6}))
    assert "digit complete picture.png --from runs/toy --keep 0.5" in found.only("start")[0]["commands"]["shell"]
    expected = pipe.complete(pixels(picture)[None], 0.5, 0, ClassPositions([6]), pixels="decoded", batch_size=16)
    assert torch.equal(pixels(found.only("picture")[0]["decoded"]), expected[0])


@pytest.mark.parametrize("keep", [[[True]], [[True] * 4] * 3, [[True] * 5] * 4, []])
def test_cells_of_another_grid_are_refused(client, picture, keep):
    found = events(client.post("/api/complete", json={"picture": picture, "keep": keep}))
    assert "no grid of 4 x 4" in found[-1][1]["text"]


def test_variations_keep_the_discriminative_tokens(client, pipe, picture):
    found = events(client.post("/api/vary", json={"picture": picture, "num": 2, "seed": 1})).only("picture")
    own = pipe.tokenizer.encode(pixels(picture)[None])
    assert [p["tokens"]["discriminative"] for p in found] == [own[0].tolist()] * 2
    assert torch.equal(pixels(found[0]["image"]), pipe.render(own, 1, batch_size=16)[0])


# ---------------------------------------------------------------- tokens, stability


def test_tokens_are_those_of_the_tokenizers(client, pipe, picture):
    found = events(client.post("/api/encode", json={"picture": picture}))
    image = pixels(picture)[None]
    assert found.only("tokens")[0]["tokens"] == {
        "discriminative": pipe.tokenizer.encode(image)[0].tolist(),
        "vq": pipe.vq.encode(image)[0].tolist(),
    }
    rebuilt = {r["tokenizer"]: pixels(r["image"]) for r in found.only("rebuilt")}
    assert torch.equal(rebuilt["vq"], pipe.vq.decode(pipe.vq.encode(image))[0])


def test_swapped_tokens_are_rendered(client, pipe):
    tokens = [k % 7 for k in range(16)]
    found = events(client.post("/api/render", json={"tokens": tokens, "seed": 9})).only("picture")[0]
    assert torch.equal(pixels(found["image"]), pipe.render([tokens], 9, batch_size=16)[0])


@pytest.mark.parametrize(("tokens", "said"), [([0] * 15, "16"), ([7] + [0] * 15, "0 to 6")])
def test_wrong_tokens_are_named(client, tokens, said):
    answer = events(client.post("/api/render", json={"tokens": tokens}))
    assert said in answer[-1][1]["text"]


def test_patches_of_a_token(client, studio):
    found = events(client.get("/api/patches/2")).only("patches")[0]
    places = int((studio.model.atlas.tokens == 2).sum())
    assert found["count"] == places and found["pictures"] == 60 and 2 not in found["near"]
    assert events(client.get("/api/patches/7"))[-1][1]["text"].startswith("token 7 is none of the 7 codes")


def test_noise_is_that_of_digit_stability(client, pipe, picture):
    found = events(client.post("/api/noise", json={"picture": picture, "snr": 12.0, "seed": 3})).only("noisy")[0]
    noisy = add_noise(pixels(picture)[None], 12.0, cfg=StabilityConfig(seed=3))
    assert torch.equal(pixels(found["image"]), noisy[0])
    assert found["tokens"]["vq"]["noisy"] == pipe.vq.encode(noisy)[0].tolist()
    assert found["tokens"]["discriminative"]["clean"] == pipe.tokenizer.encode(pixels(picture)[None])[0].tolist()


def test_the_curve_falls_with_less_noise_and_shows_the_paper(client):
    found = events(client.get("/api/curve")).only("curve")[0]
    assert found["source"] == "page" and found["images"] >= 40
    for values in found["curves"].values():
        assert values[0] <= values[-1]
    assert found["paper"]["curves"]["vq"][0] == 0.187


# ---------------------------------------------------------------- training pictures


def test_data_examples_and_palettes(client, pipe):
    data = events(client.get("/api/data?start=3&num=5")).only("picture")
    assert len(data) == 5 and all(pixels(p["image"]).shape == (3, SIZE, SIZE) for p in data)
    examples = events(client.get("/api/examples")).only("examples")[0]
    assert examples["labels"] == list(range(10))
    palettes = events(client.get("/api/palettes")).only("palettes")[0]
    assert {name: len(hex) for name, hex in palettes.items()} == {"discriminative": 6 * 7, "vq": 6 * VQ_CODES}


def test_palettes_wait_for_nobody_once_they_are_made(client, studio):
    events(client.get("/api/palettes"))
    began, go_on = threading.Event(), threading.Event()
    busy = studio.worker.submit(Job(lambda job: (began.set(), go_on.wait(30))))
    assert began.wait(10)
    assert events(client.get("/api/palettes")).only("palettes") and not busy.ended
    go_on.set()


def test_the_judge_finds_a_copy_of_a_training_picture(client, studio, monkeypatch):
    monkeypatch.setattr("digit.runs.report.load_judge", ToyJudge)
    index = events(client.get("/api/data?start=20&num=1")).only("picture")[0]
    drawn = [p["image"] for p in events(client.post("/api/draw", json={"num": 2})).only("picture")]
    body = {"pictures": [index["image"], *drawn], "labels": [index["label"], 0, 1]}
    found = events(client.post("/api/judge", json=body)).only("judged")[0]
    assert found["results"][0]["nearest"][0]["distance"] < 1e-3
    assert [len(r["nearest"]) for r in found["results"]] == [3, 3, 3]
    assert found["scale"]["low"] <= found["scale"]["median"] <= found["scale"]["high"]
    assert 0 <= found["recognised"] <= 1 and found["distance"]["images"][0] == 3


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_of_every_kind_are_cropped(client, kind):
    answer = client.post("/api/picture", content=a_picture(kind=kind))
    assert answer.status_code == 200 and pixels(answer.json()["image"]).shape == (3, SIZE, SIZE)
    assert answer.json()["settings"] is None


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in some kilobytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1_000_000, 9)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", a_picture()[:-40], bomb(), b"%PDF-1.4", b"<svg/>", b"\0" * 5000],
    ids=["empty", "text", "header", "truncated", "bomb", "pdf", "svg", "zeros"],
)
def test_what_is_no_picture_is_refused(client, content):
    answer = client.post("/api/picture", content=content)
    assert answer.status_code == 400 and answer.json()["error"].startswith("the picture")


def test_larger_uploads_are_refused_before_they_are_read(client):
    assert client.post("/api/picture", content=b"x" * (2**20 + 1)).status_code == 413

    def parts():
        for _ in range(40):
            yield b"x" * 50_000

    assert client.post("/api/picture", content=parts()).status_code == 413  # without a length
    assert MAX_UPLOAD_PIXELS < 90_000_000


def test_foreign_settings_in_a_png_do_no_harm(client):
    for text in ("[1]", "{" * 5000, "null", json.dumps({"seed": "x", "kind": "draw"}), "x" * 30_000, "\ud83d"):
        from PIL import PngImagePlugin

        about = PngImagePlugin.PngInfo()
        about.add_itxt("digit", text.encode("utf-8", "replace").decode())
        out = io.BytesIO()
        Image.new("RGB", (9, 9)).save(out, format="PNG", pnginfo=about)
        answer = client.post("/api/picture", content=out.getvalue())
        assert answer.status_code == 200 and answer.json()["same_model"] is False


@pytest.mark.parametrize(
    "url", ["", "data:,x", "http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "/etc/passwd"]
)
def test_a_picture_is_a_png_of_the_right_size(client, url):
    found = events(client.post("/api/encode", json={"picture": url}))
    assert found[-1][0] == "error" and "picture" in found[-1][1]["text"]


def test_a_png_of_another_size_is_refused(client):
    url = data_url(png(torch.zeros(3, SIZE, SIZE // 2, dtype=torch.uint8)))
    assert "the model takes 32 x 32" in events(client.post("/api/encode", json={"picture": url}))[-1][1]["text"]
    assert settings_in(b"nothing") is None


# ---------------------------------------------------------------- hostile requests


PATHS = [
    "/../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/app.py", "/static/app.js", "/app.py", "/.env", "//etc/passwd",
    "/index.html%00.js", "/api", "/api/", "/api/nothing", "/docs", "/openapi.json", "/redoc", "/%ff%fe",
    "/" + "a" * 4000,
    "/api/runs/../../etc/curves", "/api/runs/..%2f..%2fetc/curves", "/api/runs/link/curves", "/api/runs/.hidden/curves",
    "/api/runs/first/pictures/config.json", "/api/runs/first/pictures/..%2fconfig.json", "/api/runs/nothing/curves",
    "/api/runs/first/previews/../config.json", "/api/runs/first/previews/..%2f..%2fconfig.json",
    "/api/runs/first/previews//etc/passwd", "/api/runs/first/pictures/metrics.json",
    "/api/runs/no%20run/curves", "/api/compare?first=../first&second=second",
    "/api/compare?first=first", "/api/data?start=x", "/api/data?num=1e9", "/api/patches/x", "/api/patches/-1x",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_the_machine_has_an_address(client, runs, path):
    answer = client.get(path)
    assert 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text and str(runs) not in answer.text and "root:" not in answer.text
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "/api/about").status_code == 405


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"num":' + b"9" * 5000 + b"}", "application/json"),
        (b'{"num":NaN}', "application/json"),
        (b'{"num":1}', "text/plain"),
        (b"num=1", "application/x-www-form-urlencoded"),
        (b'{"num":1}', ""),
    ],
)
@pytest.mark.parametrize("path", ["/api/draw", "/api/complete", "/api/judge", "/api/runs", "/api/runs/act"])
def test_broken_bodies_are_refused(client, path, content, kind):
    answer = client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code in (400, 415) and "Traceback" not in answer.text


def test_random_bodies_never_fail_inside(client, runs):
    """Values of every type in every field: an answer below 500, and no file is written."""
    before = sorted(str(p) for p in runs.rglob("*"))
    rng = np.random.default_rng(0)
    values = [
        None,
        True,
        -1,
        0,
        3,
        1.5,
        1e308,
        2**63,
        "",
        "x" * 300,
        "../x",
        [],
        [[]],
        {},
        {"a": 1},
        ["x"],
        "data:image/png;base64,",
    ]
    fields = [
        "num",
        "seed",
        "labels",
        "prior",
        "renderer",
        "picture",
        "keep",
        "tokens",
        "snr",
        "name",
        "action",
        "label",
    ]
    paths = [
        "/api/draw",
        "/api/complete",
        "/api/vary",
        "/api/encode",
        "/api/render",
        "/api/noise",
        "/api/judge",
        "/api/runs/act",
    ]
    for _ in range(150):
        chosen = rng.choice(fields, size=rng.integers(0, 4), replace=False)
        body = {str(name): values[rng.integers(len(values))] for name in chosen}
        answer = client.post(str(rng.choice(paths)), json=body)
        assert answer.status_code < 500 and "Traceback" not in answer.text, (body, answer.text)
    assert sorted(str(p) for p in runs.rglob("*")) == before


# ---------------------------------------------------------------- several people


def test_eight_people_at_once_get_their_own_answers(client, pipe, picture):
    """200 requests of 8 threads: every picture is that of its own seed and class, all noise that of its own seed."""
    drawn = {s: pipe.generate(1, ClassPositions([s % 10]), seed=s, batch_size=16)[0] for s in range(6)}
    noisy = {s: add_noise(pixels(picture)[None], 9.0, cfg=StabilityConfig(seed=s))[0] for s in range(6)}
    wrong: list[object] = []

    def person(number: int) -> None:
        rng, headers = np.random.default_rng(number), {"x-studio-page": str(number)}
        for turn in range(25):
            seed = int(rng.integers(6))
            if turn % 5:
                body = {"picture": picture, "snr": 9.0, "seed": seed}
                answer = client.post("/api/noise", json=body, headers=headers)
                found, expected = events(answer).only("noisy"), noisy[seed]
            else:
                body = {"num": 1, "seed": seed, "labels": [seed % 10]}
                answer = client.post("/api/draw", json=body, headers=headers)
                found, expected = events(answer).only("picture"), drawn[seed]
            if len(found) != 1 or not torch.equal(pixels(found[0]["image"]), expected):
                wrong.append((number, turn, seed))

    people = [threading.Thread(target=person, args=(number,)) for number in range(8)]
    for one in people:
        one.start()
    for one in people:
        one.join()
    assert not wrong
