"""Help pages: a short first screen that agrees with the parser, and every option behind --help-all."""

import re

import pytest

from digit.cli import COMMANDS, main, usage
from digit.cli.help import FIRST_SCREEN, MAX_OPTIONS


@pytest.fixture(scope="module", autouse=True)
def terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        yield


def page(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    return set(re.findall(r"^  (--[\w.-]+)", text.partition("\nexample:")[0], flags=re.M))


def test_the_first_page_fits_a_terminal():
    assert max(map(len, usage().splitlines())) <= 100
    assert all(re.search(rf"^  {name} ", usage(), flags=re.M) for name in COMMANDS)
    assert FIRST_SCREEN.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_first_screen_is_short_and_help_all_lists_every_option(command, capsys):
    short, full = page(capsys, command, "--help"), page(capsys, command, "--help-all")
    table = {word for words in FIRST_SCREEN[command].values() for word in words.split()}
    assert options(short) == {word for word in table if word.startswith("--")} and len(options(short)) <= MAX_OPTIONS
    assert all(re.search(rf"^  {word.upper()}\b", short, flags=re.M) for word in table if not word.startswith("--"))
    assert all(f"\n{heading}:\n" in short for heading in FIRST_SCREEN[command])
    assert options(short) <= options(full)
    hidden = re.search(r"^(\d+) more options: digit \w+ --help-all$", short, flags=re.M)
    assert len(options(full) - options(short)) == (int(hidden[1]) if hidden else 0)
    for text in (short, full):
        assert "null" not in re.findall(r"default: (\S+)\)", text) and "type: " not in text


def test_help_all_of_fit_shows_every_field_and_the_defaults_of_its_recipe(capsys):
    full = page(capsys, "fit", "--recipe", "demo", "--help-all")
    assert {"--prior.dropout", "--vqgan_training.l1_weight", "--sampling.renderer.cfg_scale"} <= options(full)
    assert re.search(r"--kmeans.num_clusters INT[^-]*default:\s+512\)", full)


def test_one_setting_has_one_default_in_every_command_that_trains_or_plans(capsys):
    defaults: dict[str, dict[str, str]] = {}
    for command in ("fit", "codebook", "tokenize", "train", "plan"):
        words = " ".join(page(capsys, command, "--help-all").split())
        for option, text in re.findall(r" (--[\w.-]+) (.*?)(?= --[\w.-]+ |$)", words):
            if found := re.search(r"default: ([^),;]+)", text):
                defaults.setdefault(option, {})[command] = found[1]
    shared = {option: values for option, values in defaults.items() if len(values) > 1}
    assert len(shared) > 80
    assert not {option: values for option, values in shared.items() if len(set(values.values())) > 1}
