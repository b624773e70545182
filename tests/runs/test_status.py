"""`digit info RUN`: how far a run is, whatever state it is in, and what to type next."""

import json
import subprocess
import sys

import pytest
from studio_runs import make_run
from tiny import pixel_recipe, tiny_recipe
from toy_task import run_toy

from digit.cli import main
from digit.errors import Stopped
from digit.runs.fit import Run
from digit.runs.status import describe_run, seconds_left, time_left
from digit.runtime import lock
from digit.runtime.ledger import Ledger, Spans
from digit.runtime.progress import format_duration
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


def test_a_report_that_is_not_finished(tmp_path):
    lock.set_command(f"digit fit {DATA} --out run")
    run = Run(tiny_recipe(), DATA, tmp_path / "run")
    (run.out / "pipeline").mkdir()
    told = describe_work_of(run)
    assert (
        told == [f"report     not finished; to continue: digit fit {DATA} --out run", told[1]] and "sample" in told[1]
    )
    (run.out / "report.html").touch()
    assert describe_work_of(run) == told[1:]
    (run.out / "earlier" / "1" / "prior").mkdir(parents=True)  # another prior is to come
    assert describe_work_of(run) == [f"next       not running; to continue: digit fit {DATA} --out run"]


def describe_work_of(run: Run) -> list[str]:
    """What to type next, as told to the process that made the run."""
    return [line for line in describe_run(run.out).splitlines() if line.startswith(("report", "next", "at work"))]


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
    assert f"next       not running; to continue: digit fit {DATA}" in describe_run(run.out)  # whose run it is


# ---------------------------------------------------------------- how long it will still train


def write_tokens(folder, *, grids=(("discriminative", 2, 12), ("vq", 4, 16))):
    """The manifest of a token store, as far as its sizes go."""
    sizes = {name: {"grid": [side, side], "length": side**2, "vocab_size": codes} for name, side, codes in grids}
    (folder / "tokens").mkdir()
    (folder / "tokens" / "manifest.json").write_text(json.dumps({"classes": ["a", "b"], **sizes}))


def test_a_model_that_has_not_begun_takes_as_long_per_flop_as_one_that_has(tmp_path):
    """The prior: step 20 of 40, half a second a step. The renderer: as many steps and images, longer sequences."""
    from digit.models.sequence import training_flops
    from digit.runs.recipes import TokenSpace

    run = make_run(tmp_path / "run", done=False)
    write_tokens(run)
    recipe, spaces = tiny_recipe(), {"discriminative": TokenSpace(12, 4, 2), "vq": TokenSpace(16, 16, 4)}
    flops = [training_flops(recipe.sequence_config(n, spaces, num_classes=2)) for n in ("prior", "renderer")]
    left = time_left(run)
    assert left is not None and not left.unknown and list(left.stages) == ["prior", "renderer"]
    assert left.stages["prior"] == pytest.approx(20 * 0.5)
    assert left.stages["renderer"] == pytest.approx(4 * 0.5 * flops[1] / flops[0])
    times = [format_duration(seconds) for seconds in (left.seconds, *left.stages.values())]
    assert f"left       about {times[0]} of training: prior 0:10, renderer {times[2]}\n" in describe_run(run)


def test_before_the_tokens_are_made_the_rest_is_not_known(tmp_path):
    run = make_run(tmp_path / "run", done=False)
    assert str(time_left(run)) == "at least 0:10 of training: prior 0:10; not known yet: renderer"


def test_the_present_speed_counts(tmp_path):
    """A hundred slow steps, then fast ones: what is left takes as long as the last lines say."""
    run = make_run(tmp_path / "run", done=False, steps=200)
    seconds = [i * 10.0 if i <= 100 else 1000 + (i - 100) * 0.1 for i in range(1, 131)]
    log = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(seconds, 1)]
    (run / "prior" / "log.jsonl").write_text("\n".join(log))
    assert seconds_left(run / "prior") == pytest.approx(70 * 0.1)


def test_a_renderer_straight_to_pixels_is_not_counted_before_it_trains(tmp_path):
    run = Run(pixel_recipe(), DATA, tmp_path / "run")
    left = time_left(run.out)
    assert left is not None and left.unknown == ("codebook", "vqgan", "tokens", "prior", "renderer_pixels")
    run.train_model("prior")
    left = time_left(run.out)
    assert left is not None and left.unknown == ("renderer_pixels",) and not left.stages
    assert "left " not in describe_run(run.out)
    run.train_model("renderer_pixels")
    assert time_left(run.out) is None


@pytest.mark.parametrize("line", ['{"step": 9, "seconds": NaN}', '{"step": 9, "seconds": 1e999}', '{"step": 9}', ""])
def test_a_damaged_log_tells_no_time(tmp_path, line):
    run = make_run(tmp_path / "run", done=False)
    (run / "prior" / "log.jsonl").write_text(line)
    assert seconds_left(run / "prior") is None
    (run / "prior" / "log.jsonl").write_text('{"step": 9, "seconds": 3.0}')
    (run / "prior" / "checkpoints" / "config.json").write_text(f'{{"train": {{"num_steps": {"9" * 400}}}}}')
    assert seconds_left(run / "prior") is None
    (run / "config.json").write_text('{"format": 2, "recipe": {"depth": "x"}}')
    assert time_left(run) is None
