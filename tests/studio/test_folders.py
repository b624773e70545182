"""Runs in a folder: what is told of them, and fits that start, stop and continue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studio_runs import make_run
from studio_toys import wait_until

from digit.errors import DigitError
from digit.studio import folders
from digit.studio.folders import Folder, is_digit, without_paths

FIT = """
import json, signal, sys, time
from digit.runtime.lock import lock_folder
out = sys.argv[sys.argv.index("--out") + 1]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
lock_folder(out)
print(json.dumps(sys.argv[1:]), flush=True)
print("prior step 7 of 10 in /home/me/runs/x", flush=True)
time.sleep(60)
"""  # a fit that holds its folder and obeys SIGTERM, without training


@pytest.fixture
def place(tmp_path, monkeypatch) -> Folder:
    """A folder of runs whose fits are FIT."""
    program = tmp_path / "digit"
    program.write_text(FIT)
    monkeypatch.setattr(folders, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    root = tmp_path / "runs"
    root.mkdir()
    made = Folder(root)
    yield made
    made.close()


def test_each_run_is_told_in_a_few_words(client, runs):
    found = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
    assert set(found) == {"first", "second"}
    first = found["first"]
    assert first["recipe"] == "tiny" and first["data"] == "shapes" and first["done"] and not first["at_work"]
    assert {"name": "codebook", "state": "done", "done": True} in first["stages"]
    assert first["metrics"] == {"psnr_db": 21.5, "recognised": 0.75} and first["bytes"] > 300
    assert first["pictures"] == ["samples.png", "reconstructions.png"] and first["whole"] is None


def test_the_time_that_a_run_still_takes(tmp_path):
    """Step 20 of 40 at half a second a step; the renderer has not begun, and without tokens nothing tells its time."""
    run = make_run(tmp_path / "half", done=False)
    with (run / "prior" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 20, "note": "loss 9 at step 20 in /home/me/runs"}) + "\n")
    [found] = Folder(tmp_path).describe_all()
    assert found["whole"] == {"seconds": 10.0, "unknown": ["renderer"]} and found["current"] == "prior"
    assert found["message"] == "loss 9 at step 20 in runs" and found["ended"] is None


def test_an_infinite_metric_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.json").write_text(f'{{"psnr": Infinity, "fd": 3, "many": {"9" * 400}}}')
    assert Folder(tmp_path).describe_all()[0]["metrics"] == {"fd": 3}


def test_curves_and_pictures(client):
    curves = client.get("/api/runs/first/curves").json()
    assert curves["prior"]["nll"][0] == [2, 3.9] and len(curves["prior"]["loss"]) == 10
    picture = client.get("/api/runs/first/pictures/samples.png")
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")


def test_previews_show_how_the_models_grew(tmp_path):
    run = make_run(tmp_path / "run", done=False)
    (run / "previews").mkdir()
    for name in ("renderer_growth.png", "vqgan_growth.png", "prior_00000400.png", "other_growth.png"):
        (run / "previews" / name).write_bytes(b"PNG")
    (run / "previews" / "prior_growth.png").symlink_to("/etc/passwd")
    place = Folder(tmp_path)
    [found] = place.describe_all()
    assert found["previews"] == ["vqgan_growth.png", "renderer_growth.png"]
    assert place.preview("run", "vqgan_growth.png").read_bytes() == b"PNG"
    for name in ("prior_growth.png", "prior_00000400.png", "../config.json", "/etc/passwd", "", "linked/passwd"):
        with pytest.raises(DigitError, match="no such picture"):
            place.preview("run", name)
    (run / "previews").rename(tmp_path / "elsewhere")
    (run / "previews").symlink_to(tmp_path / "elsewhere")
    assert place.describe_all()[0]["previews"] == []


def test_two_runs_side_by_side(client):
    found = client.get("/api/compare?first=first&second=second").json()
    assert found["differences"] == [{"name": "prior_training.learning_rate", "first": "0.002", "second": "0.004"}]
    assert found["metrics"][0]["psnr_db"] == 21.5


def test_a_setting_that_an_older_run_lacks_has_its_default(tmp_path):
    for name in ("old", "new"):
        make_run(tmp_path / name)
    cfg = json.loads((tmp_path / "old" / "config.json").read_text())
    del cfg["recipe"]["pixels"]["prefix_noise"], cfg["recipe"]["pixels_training"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(cfg))
    assert Folder(tmp_path).compare("old", "new")["differences"] == []


def test_links_and_damaged_runs_are_left_out(tmp_path):
    make_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").symlink_to(tmp_path / "good" / "config.json")
    (tmp_path / "good" / "token_map.png").symlink_to("/etc/passwd")
    place = Folder(tmp_path)
    assert [run["name"] for run in place.describe_all()] == ["good"]
    with pytest.raises(DigitError, match="no such picture"):
        place.picture("good", "token_map.png")


def test_a_log_that_anybody_may_have_written_does_no_harm(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [
        b'{"step": 1, "nll": NaN}',
        b'{"step": 2, "nll": "x"}',
        b"\xff\xfe",
        b'{"step": 3, "nll": 1e300}',
        b'{"step": 4, "nll": 2.0}',
    ]
    (run / "prior" / "log.jsonl").write_bytes(b"\n".join(lines))
    (run / "metrics.json").write_text('{"a": NaN, "b": [1], "c": 2}')
    (run / ".lock").write_text(json.dumps({"pid": 1, "host": "x", "command": "rm -rf /"}))
    place = Folder(tmp_path)
    assert place.curves("run") == {"prior": {"nll": [(4, 2.0)]}}
    [found] = place.describe_all()
    assert found["metrics"] == {"c": 2} and not found["at_work"] and "rm" not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a step failed: /home/me/runs/x/prior/crash/step_7", "a step failed: step_7"),
        ("no such path: ~/data/photos; wanted a folder", "no such path: photos; wanted a folder"),
        ("../shared/data/x.png: broken", "x.png: broken"),
        ("12 of 40 images (30 %), 3/4 done", "12 of 40 images (30 %), 3/4 done"),
    ],
)
def test_without_paths(text, shown):
    assert without_paths(text) == shown


# ---------------------------------------------------------------- processes


def started_with(place: Folder, name: str) -> list[str]:
    """The arguments that a fit of FIT was started with."""
    output = place._output(name)
    assert wait_until(lambda: output.exists() and b"step 7" in output.read_bytes())
    return json.loads(output.read_text().splitlines()[0])


def test_a_fit_starts_and_stops(place):
    place.start("new", "demo", "shapes", 5)
    out = str(place.root / "new")
    assert started_with(place, "new") == ["fit", "shapes", "--recipe", "demo", "--seed", "5", "--out", out]
    make_config(Path(out))
    [run] = place.describe_all()
    assert run["at_work"] and run["can_stop"] and run["message"] == "prior step 7 of 10 in x"
    with pytest.raises(DigitError, match="already"):
        place.start("new", "demo", "shapes", 5)
    place.stop("new")
    assert place.started["new"].wait(30) == 143
    with pytest.raises(DigitError, match="nothing to stop"):
        place.stop("new")


def test_a_fit_that_fails_at_once_is_told(place, tmp_path, monkeypatch):
    """It leaves no run folder: without this the page would show nothing at all."""
    failing = tmp_path / "failing"
    failing.write_text("import sys; print('no such path: /home/me/photos'); sys.exit(2)")
    monkeypatch.setattr(folders, "PROGRAM", (sys.executable, str(failing)))
    place.start("new", "demo", "shapes", 0)
    assert place.started["new"].wait(30) == 2
    assert place.starting() == [{"name": "new", "message": "no such path: photos", "ended": 2}]


def make_config(out: Path) -> None:
    """What a true fit writes first."""
    donor = make_run(out.parent / "donor", done=False)
    os.replace(donor / "config.json", out / "config.json")
    import shutil

    shutil.rmtree(donor)


def test_a_stopped_fit_continues_with_its_own_settings(place):
    make_run(place.root / "half", done=False, lr=0.007)
    [run] = place.describe_all()
    assert run["can_continue"] and not run["done"]
    place.go_on("half")
    words = started_with(place, "half")
    assert words[:2] == ["fit", "shapes"] and words[-1] == str(place.root / "half")
    settings = json.loads(Path(words[words.index("--config") + 1]).read_text())
    assert settings["prior_training"]["learning_rate"] == 0.007
    with pytest.raises(DigitError, match="at work already"):
        place.go_on("half")


def test_a_run_of_other_data_does_not_continue(place):
    run = make_run(place.root / "other", done=False)
    cfg = json.loads((run / "config.json").read_text())
    cfg["data"] = {"name": "/etc", "fingerprint": "0" * 64}
    (run / "config.json").write_text(json.dumps(cfg))
    assert not place.describe_all()[0]["can_continue"]
    with pytest.raises(DigitError, match="are not known here"):
        place.go_on("other")
    assert not place.started


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"name": "../x", "recipe": "demo", "data": "shapes"}, "name"),
        ({"name": "/tmp/x", "recipe": "demo", "data": "shapes"}, "name"),
        ({"name": "a b", "recipe": "demo", "data": "shapes"}, "name"),
        ({"name": "x\n", "recipe": "demo", "data": "shapes"}, "name"),
        ({"name": "-x", "recipe": "demo", "data": "shapes"}, "name"),
        ({"name": "x", "recipe": "../demo", "data": "shapes"}, "no recipe of this name"),
        ({"name": "x", "recipe": "demo", "data": "/etc"}, "no data of this name"),
        ({"name": "first", "recipe": "demo", "data": "shapes"}, "already"),
        ({"name": "link", "recipe": "demo", "data": "shapes"}, "already"),
        ({"name": "x", "recipe": "demo", "data": "shapes", "--out": "/tmp"}, "--out"),
    ],
)
def test_only_names_start_a_fit(client, studio, body, said):
    answer = client.post("/api/runs", json=body)
    assert answer.status_code == 400 and said in answer.json()["error"] and not studio.folder.started


@pytest.mark.parametrize("action", ["stop", "continue"])
def test_read_only_starts_and_stops_nothing(runs, action):
    from starlette.testclient import TestClient
    from studio_toys import studio_pipeline

    from digit.studio.app import Studio, make_app
    from digit.studio.model import Model

    studio = Studio(Model(studio_pipeline(), "toy"), Folder(runs, read_only=True))
    client = TestClient(make_app(studio), base_url="http://127.0.0.1")
    assert client.get("/api/about").json()["read_only"]
    answers = [
        client.post("/api/runs", json={"name": "x", "recipe": "demo", "data": "shapes"}),
        client.post("/api/runs/act", json={"name": "first", "action": action}),
    ]
    assert all(a.status_code == 400 and "read-only" in a.json()["error"] for a in answers)
    assert not any(run["can_stop"] or run["can_continue"] for run in client.get("/api/runs").json()["runs"])
    assert client.post("/api/draw", json={"num": 1}).status_code == 200
    studio.close()


def test_a_process_that_is_no_digit_is_never_stopped(place):
    """A lock of another program, or a number that was given away again: nothing is sent to it."""
    script = (
        "import sys, time; from digit.runtime.lock import lock_folder; lock_folder(sys.argv[1]); "
        "print(1, flush=True); time.sleep(60)"
    )
    run = make_run(place.root / "held", done=False)
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline()
        [found] = place.describe_all()
        assert found["at_work"] and not found["can_stop"]
        with pytest.raises(DigitError, match="nothing to stop"):
            place.stop("held")
        assert process.poll() is None and not is_digit(process.pid) and not is_digit(1 << 22)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_closing_stops_what_the_page_has_started(place):
    place.start("one", "demo", "shapes", 0)
    started_with(place, "one")
    messages = place._messages
    place.close()
    assert place.started["one"].returncode == 143 and not messages.exists()


def test_no_more_than_two_fits(place):
    for name in ("a", "b"):
        place.start(name, "demo", "shapes", 0)
    with pytest.raises(DigitError, match="a and b are at work"):
        place.start("c", "demo", "shapes", 0)
    time.sleep(0.1)
