"""The studio served at a port: closed pages, many at once, signals, the command's own messages."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from studio_toys import serving, studio_pipeline, wait_until

import digit
from digit.cli import main
from digit.studio.app import Studio
from digit.studio.folders import Folder
from digit.studio.jobs import Worker
from digit.studio.model import Model
from digit.studio.serve import addresses, listen


def test_a_closed_page_ends_its_job(server, monkeypatch):
    began, ended = threading.Event(), threading.Event()

    def endless(self, job, request):
        try:
            while True:
                began.set()
                job.emit("step", n=1)
                threading.Event().wait(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(Model, "draw", endless)
    with httpx.stream("POST", f"{server}/api/draw", json={"num": 1}, timeout=30) as answer:
        assert next(answer.iter_bytes()) and began.wait(10)
    assert ended.wait(20)
    assert wait_until(lambda: httpx.get(f"{server}/api/waiting").json()["waiting"] == 0)


def test_a_closed_page_frees_its_place_in_the_queue(server, monkeypatch):
    go_on, ran = threading.Event(), []
    monkeypatch.setattr(Model, "draw", lambda self, job, request: go_on.wait(30))
    monkeypatch.setattr(Model, "encode", lambda self, job, request: ran.append(1))
    body = {"picture": "x"}
    with contextlib.ExitStack() as pages:
        first = pages.enter_context(httpx.stream("POST", f"{server}/api/draw", json={"num": 1}, timeout=30))
        assert wait_until(lambda: httpx.get(f"{server}/api/waiting").json()["waiting"] == 1)
        with httpx.stream("POST", f"{server}/api/encode", json=body, timeout=30) as second:
            assert b"before" in next(second.iter_bytes())
        assert wait_until(lambda: httpx.get(f"{server}/api/waiting").json()["waiting"] == 1)
        go_on.set()
        first.read()
    assert not ran


RAW = [
    b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    b"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nZZ\r\n",
    b"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
    b"POST /api/picture HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\nx",
]  # fmt: skip


def test_bytes_that_are_no_request_do_no_harm(server, caplog):
    """Broken, contradictory and unfinished requests: none is obeyed, and the next one works."""
    host, port = server.removeprefix("http://").split(":")
    for raw in RAW:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        status = answer.split(b" ")[1][:3] if answer.startswith(b"HTTP/1.1 ") else b""
        allowed = b"Upgrade" in raw or b"GET http://" in raw  # an upgrade is ignored; the host is that of the header
        assert status[:1] in (b"", b"4") or (allowed and status == b"200"), (raw[:80], answer[:200])
        assert b"Traceback" not in answer
    assert httpx.get(f"{server}/api/about").status_code == 200
    assert "Traceback" not in caplog.text


def test_readers_that_never_read_keep_nobody_waiting(server):
    """Open streams that nobody reads: the jobs end, and other people draw."""
    body = json.dumps({"num": 16}).encode()
    head = b"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-Studio-Page: %d\r\n"
    host, port = server.removeprefix("http://").split(":")
    with contextlib.ExitStack() as kept:
        for person in range(6):
            connection = kept.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(head % person + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = httpx.post(f"{server}/api/draw", json={"num": 1}, timeout=60)
        assert answer.text.count("event: picture") == 1
    assert wait_until(lambda: httpx.get(f"{server}/api/waiting").json()["waiting"] == 0)


def test_sampling_stops_within_a_step(pipe):
    """Stop is heard at the next token, not at the end of the batch."""
    steps = []

    class Enough(Exception):
        pass

    def on_step(stage, tokens):
        steps.append((stage, int((tokens >= 0).sum())))
        if len(steps) == 5:
            raise Enough

    with pytest.raises(Enough):
        list(pipe.stream(4, on_step=on_step))
    assert steps == [("prior", 4 * n) for n in range(1, 6)]


def test_memory_stays_flat_over_many_drawings(pipe, unchecked):
    """The queue, the events and the pictures of 80 jobs leave nothing behind."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc on this system")
    from digit.studio.jobs import Job
    from digit.studio.requests import Draw

    model, worker = Model(pipe, "toy"), Worker()

    def draw(seed: int) -> None:
        job = worker.submit(Job(lambda job: model.draw(job, Draw(num=4, seed=seed))))
        assert wait_until(lambda: job.ended)

    for seed in range(20):
        draw(seed)
    before = resident()
    for seed in range(60):
        draw(seed)
    assert resident() - before < 8 * 2**20
    worker.stop()


def test_addresses():
    assert addresses("127.0.0.1", []) == {"127.0.0.1"}
    assert addresses("10.1.2.3", ["Studio.Example"]) == {"10.1.2.3", "studio.example"}
    assert socket.gethostname().lower() in addresses("0.0.0.0", [])
    assert "0.0.0.0" not in addresses("0.0.0.0", [])


def test_another_address_makes_a_token(pipe, runs, monkeypatch):
    import digit.studio.serve as serve

    lines = []
    studio = Studio(Model(pipe, "toy"), Folder(runs))
    monkeypatch.setattr(serve.Server, "run", lambda self, sockets: self.on_ready())
    serve.serve(studio, host="127.0.0.2", port=0, say=lines.append)  # of this machine alone: no token
    serve.serve(studio, host="0.0.0.0", port=0, say=lines.append)
    serve.serve(studio, port=0, allow_host=["studio.example"], say=lines.append)
    told = [line for line in lines if line.startswith("studio:")]
    assert "token" not in told[0] and "?token=" in told[1] and "?token=" in told[2]


def test_a_taken_port_is_named():
    with listen("127.0.0.1", 0) as taken, pytest.raises(Exception, match=r"choose another --port, 0 for any"):
        listen("127.0.0.1", taken.getsockname()[1])


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the smallest recipe."""
    from tiny import SHAPES, tiny_recipe

    from digit.runs.fit import Run, fit

    out = tmp_path_factory.mktemp("tiny") / "run"
    fit(Run(tiny_recipe(), SHAPES, out))
    return out


def test_the_command_serves_until_ctrl_c(run):
    words = [sys.executable, "-m", "digit", "studio", "run", "--port", "0", "--data", "shapes:num=24,size=32"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process = subprocess.Popen(words, cwd=run.parent, **pipes)
    try:
        line = process.stdout.readline()
        assert line.startswith("studio: http://127.0.0.1:"), process.stderr.read()
        address = line.split()[1]
        about = httpx.get(f"{address}api/about").json()
        assert about["run"] == "run" and about["data"]["num"] == 24
        answer = httpx.post(f"{address}api/draw", json={"num": 2, "seed": 1}, timeout=60)
        assert answer.text.count("event: picture") == 2
        assert [r["name"] for r in httpx.get(f"{address}api/runs").json()["runs"]] == ["run"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "the studio is closed" in out and not err
    finally:
        process.kill()
        process.wait()


def test_the_command_says_what_is_missing(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(digit, "studio", digit.studio)  # put back afterwards: the import below makes another one
    for name in [name for name in sys.modules if name.startswith("digit.studio")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["studio", str(run)]) == 2
    assert "pip install 'digit-image-tokens[studio]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port"),
        (["--max_upload", "0"], "--max_upload"),
        (["--token", "short"], "--token"),
        (["--runs", "nowhere"], "--runs nowhere is no folder"),
        (["--data", "nowhere"], "no such path: nowhere"),
    ],
)
def test_wrong_options_are_named(run, words, said, capsys):
    assert main(["studio", str(run), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_pipeline_without_data_or_runs_still_draws(tmp_path):
    studio = Studio(Model(studio_pipeline(), "toy"), Folder(None))
    for address in serving(studio):
        about = httpx.get(f"{address}/api/about").json()
        assert about["data"] is None and about["runs"] is False
        assert httpx.post(f"{address}/api/draw", json={"num": 1}, timeout=60).text.count("event: picture") == 1
        told = httpx.get(f"{address}/api/data", timeout=60).text
        assert "start the studio with --data PATH" in json.dumps(told)
        assert httpx.get(f"{address}/api/runs").json()["runs"] == []
    studio.close()
    assert torch.get_num_threads() >= 1
