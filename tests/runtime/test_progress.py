"""Progress: a bar that fits its terminal, plain lines elsewhere, and the time of all stages."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import pytest

from digit.runtime import progress
from digit.runtime.output import Output
from digit.runtime.progress import Progress, Stages, columns

METRICS = {"loss": 3.56071, "lr": 0.00123, "images_per_second": 86.3326, "mfu": 0.2412, "data_wait": 0.0003}
WORK = """
import sys, time
from digit.runtime.progress import Progress, Stages
with Stages(["tokens", "prior", "report"], {"report": 60.0}).enter("prior"), Progress("prior", 400, done=100) as bar:
    for _ in range(3):
        time.sleep(0.3)
        bar.update(10, loss=3.56071, lr=0.00123, images_per_second=86.3326)
"""


@pytest.fixture
def bar(monkeypatch):
    """A bar in its 10th second, 100 of 400 units done."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: 10.0)
    bar = Progress("renderer", 400)
    bar.started, bar.done, bar.metrics, bar._out = 0.0, 100, dict(METRICS), Output(io.StringIO())
    return bar


@pytest.fixture
def stages(monkeypatch):
    """Stage 5 of 6, with 40 seconds for the last."""
    stages = Stages(["codebook", "vqgan", "tokens", "prior", "renderer", "report"], {"report": 40.0})
    with stages.enter("renderer"):
        yield stages


@pytest.mark.parametrize("width", [30, 39, 40, 60, 79, 80, 100, 120, 200, 400])
def test_bar_count_and_eta_stay_at_any_width(bar, stages, width):
    parts = bar.parts(width)
    assert columns(parts) <= width and parts["count"] == "100/400" and parts["eta"] == "ETA 0:30"
    assert len(parts["bar"]) >= progress.LEAST_BAR and set(parts["bar"]) <= {"━", "─"}


def test_the_least_important_leave_first(bar, stages):
    shown = [set(bar.parts(width)) for width in range(200, 30, -1)]
    assert shown[0] == {"title", "description", "bar", "count", "eta", "whole", "elapsed", *METRICS}
    for wide, narrow in pairwise(shown):
        assert narrow <= wide
    leaving = [name for wide, narrow in pairwise(shown) for name in wide - narrow]
    assert leaving[:3] == ["data_wait", "mfu", "images_per_second"] and leaving[-3:] == ["loss", "whole", "title"]


def test_80_columns_show_stage_whole_and_loss(bar, stages):
    line = " ".join(bar.parts(79).values())
    assert re.fullmatch(r"stage 5 of 6 renderer [━─]{10,} 100/400 ETA 0:30 all ~1:10( in 0:10)? loss 3.561", line), line


def test_huge_numbers_cut_the_description(bar):
    bar.description, bar.total, bar.done = "features for k-means", 1_281_167_000, 1_281_166_000
    parts = bar.parts(39)
    assert columns(parts) <= 39 and parts["count"] == "1281166000/1281167000" and "ETA" in parts["eta"]


def test_without_an_end_there_is_no_bar_and_before_the_first_unit_no_time(bar):
    bar.done = 0
    assert bar.parts(79)["eta"] == "ETA -:--"
    bar.total = None
    assert {"bar", "eta"}.isdisjoint(bar.parts(79))


def test_the_time_of_all_stages_is_not_guessed(bar, stages):
    assert stages.left(bar) == 30 + 40
    bar.description = "decode images"  # a part of the stage
    stages.seconds["renderer"] = 95.0
    assert stages.left(bar) == 95 - (10 - stages.began) + 40
    stages.seconds.clear()
    assert stages.left(bar) is None and bar._whole() == ""


def test_later_stages_are_expected_at_the_pace_of_those_so_far(bar, stages, monkeypatch):
    stages.seconds = {"codebook": 10.0, "vqgan": 0.0, "tokens": 30.0, "renderer": 80.0, "report": 40.0}
    stages.spent = {"codebook": 5.0, "vqgan": 0.1, "tokens": 15.0}
    measured = bar.left()
    own = 10 - stages.began + measured  # seconds of the renderer in all
    assert stages.left(bar) == pytest.approx(measured + 40 * (20 + own) / (40 + 80))
    bar.description = "decode images"  # a part of the stage tells nothing of its pace
    assert stages.left(bar) == pytest.approx(80 - (10 - stages.began) + 40 / 2)
    stages.spent = {"codebook": 500.0}
    assert stages.left(bar) == pytest.approx(80 - (10 - stages.began) + 40 * progress.MOST_OFF)


def test_a_stage_that_failed_tells_no_pace():
    stages = Stages(["tokens", "prior"], {"tokens": 3.0, "prior": 5.0})
    with stages.enter("tokens"):
        pass
    with pytest.raises(RuntimeError), stages.enter("prior"):
        raise RuntimeError
    assert set(stages.spent) == {"tokens"}


def test_bar_in_ascii_where_the_terminal_knows_no_more(bar):
    bar._out = Output(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert set(bar.parts(79)["bar"]) == {"#", "-"}


def on_terminal(width: int, **environment: str) -> str:
    """What WORK writes to a terminal."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "TERM")}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=secondary, stderr=secondary, env=known | {"TERM": "xterm"} | environment
    )
    os.close(secondary)
    told = b""
    while True:
        try:
            told += (new := os.read(primary, 4096))
        except OSError:  # the other end is closed
            new = b""
        if not new:
            break
    os.close(primary)
    assert worker.wait() == 0
    return told.decode()


@pytest.mark.parametrize(
    "width, environment, columns", [(40, {}, 40), (200, {}, 200), (0, {}, 80), (200, {"COLUMNS": "50"}, 50)]
)
def test_a_terminal_of_any_width(width, environment, columns):
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(width, **environment)))
    frames = [frame for frame in frames if frame]
    assert all(len(frame) < columns and "/400 ETA " in frame for frame in frames), frames
    assert "130/400" in frames[-1] and ("stage 2 of 3" in frames[-1]) == (columns >= 50)


def test_colours_can_be_turned_off():
    assert "\x1b[36m" in on_terminal(80)
    assert re.search(r"\x1b\[[0-9;]*3[0-7]", on_terminal(80, NO_COLOR="1")) is None


def test_a_dumb_terminal_and_a_pipe_get_plain_lines():
    assert on_terminal(80, TERM="dumb") == ""  # less than 2 s: nothing to tell
    code = WORK.replace("Progress(", "progress.Progress(").replace("import Progress, Stages", "import Stages")
    code = "from digit.runtime import progress; progress.LINE_EVERY_SECONDS = 0.1\n" + code
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    lines = told.stderr.decode("ascii").splitlines()
    assert told.stdout == b"" and len(lines) == 3 and all(line.isprintable() for line in lines)
    assert re.fullmatch(r"stage 2 of 3, prior: 110/400 in 0:00  ETA 0:\d\d  all ~1:\d\d  loss 3.561  .*", lines[0])


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2>&1 | true", ">&- 2>&-"])
def test_work_ends_well_whatever_becomes_of_its_lines(closed, tmp_path):
    code = "from digit.runtime import progress; progress.LINE_EVERY_SECONDS = 0.1\n" + WORK
    code = code.replace("Progress(", "progress.Progress(") + f"open({str(tmp_path / 'done')!r}, 'w')"
    subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" {closed}', code], check=True)
    assert (tmp_path / "done").exists()


def test_a_line_is_written_once(bar, monkeypatch):
    """The end of the work does not repeat the line of its last update."""
    monkeypatch.setitem(progress._state, "quiet", False)
    stream = io.StringIO()
    bar._out = Output(stream)
    bar._line()
    bar._line()
    assert stream.getvalue().count("renderer: 100/400") == 1
