"""`digit info RUN`: how far a run is, whatever state it is in, and what to type next."""

import subprocess
import sys

import pytest
from tiny import tiny_recipe
from toy_task import run_toy

from digit.cli import main
from digit.errors import Stopped
from digit.runs.fit import Run
from digit.runs.status import describe_run
from digit.runtime.ledger import Ledger, Spans
from digit.training import checkpoint

DATA = "shapes:num=24,size=32"


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tiny_recipe(), DATA, tmp_path / "run")


def test_each_stage_as_far_as_it_is(run, capsys, monkeypatch):
    monkeypatch.setattr("digit.runtime.lock._about", {"command": f"digit fit {DATA} --out run"})
    assert "codebook" not in describe_run(run.out)
    run.fit_codebook()
    run_toy(run.out / "prior", num_steps=9, save_every=4)
    text = describe_run(run.out)
    assert "run        recipe tiny on shapes" in text and "codebook   done" in text and "tokens" not in text
    assert "prior      step 9 of 9, saved at step 9 (loss" in text
    checkpoint.save(run.out / "prior" / "checkpoints", 10, {}, keep=3, metrics={"val_nll": 2.5})
    assert "lowest validation loss 2.5 in step_00000010" in describe_run(run.out)
    assert main(["info", str(run.out)]) == 0
    assert "next       not running; to continue: " in capsys.readouterr().out


def test_what_other_settings_replaced(run):
    assert "earlier" not in describe_run(run.out)
    for number in (1, 2, 10):
        (run.out / "earlier" / str(number)).mkdir(parents=True)
    assert f"earlier    3 changes of settings, what the last one replaced: {run.out}/earlier/10" in describe_run(
        run.out
    )


def test_tokens_half_done(run, monkeypatch):
    run.tokenizer()
    run.train_vqgan()
    monkeypatch.setattr("digit.data.token_writer.StopSignals.asked", True)
    with pytest.raises(Stopped):
        run.write_tokens()
    assert "tokens     24 rows are done" in describe_run(run.out)


def test_a_drawing_half_done(tmp_path, capsys):
    Ledger({"num": 50}, 50, Spans([(0, 16), (32, 48)])).save(tmp_path / "journal.json")
    assert main(["info", str(tmp_path)]) == 0
    assert "samples    32 of 50 images are sampled\nnext       not running" in capsys.readouterr().out
    (tmp_path / "samples.json").write_text('{"request": {"num": 50}}')
    assert main(["info", str(tmp_path)]) == 0
    assert "samples    50 images, all sampled" in capsys.readouterr().out


def test_who_is_at_work(run):
    hold = (
        "import sys, time\nfrom digit.runtime import lock\nlock.set_command('digit fit photos/')\n"
        "lock.lock_folder(sys.argv[1])\nprint('held', flush=True)\ntime.sleep(60)"
    )
    from digit.runtime.lock import release_folder

    release_folder(run.out)
    other = subprocess.Popen([sys.executable, "-c", hold, str(run.out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert f"at work    process {other.pid} on" in describe_run(run.out)
        assert describe_run(run.out).endswith("digit fit photos/")
    finally:
        other.kill()
        other.wait()
    assert "next       not running; to continue: digit fit photos/" in describe_run(run.out)
