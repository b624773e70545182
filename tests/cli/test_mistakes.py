"""Mistakes are named as the person typed them, with the closest name beside them."""

import pytest

from cli.test_cli import fails
from digit.cli.mistakes import with_suggestion, with_typed_option
from digit.runtime.names import closest

FIT = ["fit", "shapes:num=8,size=32", "--recipe", "demo", "--out", "never"]
SAMPLE = ["sample", "--from", "nowhere", "--out", "never"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["smaple"], "no command named smaple: did you mean sample?"),
        ([*FIT, "--prior.dept", "3"], "no option named --prior.dept: did you mean --prior.depth?"),
        ([*FIT, "--prior.dept=3"], "no option named --prior.dept: did you mean --prior.depth?"),
        ([*FIT, "--depth", "3"], "did you mean --prior.depth or --renderer.depth or --pixels.depth?"),
        ([*FIT, "--prior.depth", "deep"], "--prior.depth is deep: it must be a whole number"),
        ([*FIT, "--prior.depth", "0"], "--prior.depth is 0: "),
        ([*FIT, "--kmeans.init", "randm"], "--kmeans.init is randm: did you mean random?"),
        ([*FIT, "--prior_training.betas", "0.9"], "--prior_training.betas is 0.9: give FLOAT,FLOAT"),
        (
            [*FIT, "--vqgan_training.num_steps", "4"],
            "--vqgan_training.adversarial_start is ",
        ),
        (["plan", "../photos/"], "../photos/ is no recipe: a plan takes a recipe's name and the number of pictures"),
        ([*FIT[:3], "dmo", "--out", "never"], "no recipe named dmo: did you mean demo?"),
        (["fit", "shapes"], "missing: --out"),
        (["train", "piror", *FIT[1:]], "no model named piror: did you mean prior?"),
        (["sample", "--out", "never"], "missing: --from"),
        (["sample", "--out", "never", "--from"], "--from needs a value"),
        (["sample", "--out", "never", "--from="], "--from is empty"),
        (SAMPLE, "--from: nowhere does not exist"),
        ([*SAMPLE, "--prior.top_k", "many"], "--prior.top_k is many: it must be a whole number"),
        (["stability", "shapes", *SAMPLE[1:]], "--from: nowhere does not exist"),
        (["reproduce", "tabel1"], "did you mean table1?"),
        (["plan", "small", "--gpu", "h10"], "did you mean h100?"),
        (["plan", "small", "--gpu-memory", "0"], "--gpu-memory is 0.0: it must be above 0"),
    ],
)
def test_a_mistake_is_named_as_typed(argv, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in fails(capsys, *argv)


def test_a_settings_file_names_the_setting(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, text in (
        ("prior: {dept: 3}", "no setting named prior.dept: did you mean prior.depth?"),
        ("prior_trainin: {num_steps: 3}", "no setting named prior_trainin: did you mean prior_training?"),
        ("prior: {depth: deep}", "--prior.depth is deep"),
        ("prior: [1", "--config: not a YAML file"),
    ):
        (tmp_path / "settings.yaml").write_text(content)
        assert text in fails(capsys, *FIT, "--config", "settings.yaml")


def test_suggestions():
    assert closest("prior", ["--prior.depth"]) == [] and closest("xyz", ["abc"]) == []
    assert with_suggestion("no device named 'gpu': choose cpu or cuda") == "no device named 'gpu': choose cpu or cuda"
    assert with_suggestion("no such path: photos") == "no such path: photos"
    assert with_typed_option("num is 0: at least 1", ["--num", "0"]) == "--num is 0: at least 1"
    assert with_typed_option("depth is 0", ["--prior.depth", "0", "--renderer.depth", "1"]) == "depth is 0"
