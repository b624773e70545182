"""digit reproduce: settings of the scale and its recipe, and what is refused."""

import pytest

from digit.cli import arguments, main
from digit.cli.reproduction import add_arguments, chosen_scale, long_form
from digit.errors import DigitError
from digit.reproduce.scales import get_scale
from digit.runs.recipes import Recipe


def scale_of(*words: str):
    argv = [long_form(word) for word in ("table3", *words)]
    parser = arguments.make_parser("reproduce")
    base = add_arguments(parser, argv)
    return chosen_scale(arguments.parse(parser, argv), argv, base)


def test_without_options_a_scale_is_as_it_is():
    assert scale_of("--scale", "small") == get_scale("small")


def test_settings_of_the_scale_and_of_its_recipe(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("renderer_training:\n  accumulate: 4\nnum_test: 9\n")
    scale = scale_of("--scale=paper", "--samples", "500", "--seeds", "0,1,2", f"--config={settings}",
                     "--prior_training.checkpoint_activations", "true", "--sampling.precision=bf16")  # fmt: skip
    assert (scale.num_samples, scale.num_test, scale.seeds) == (500, 9, (0, 1, 2))
    for recipe in (value for value in vars(scale).values() if isinstance(value, Recipe)):
        assert recipe.renderer_training.accumulate == 4 and recipe.prior_training.checkpoint_activations
        assert recipe.sampling.precision == "bf16"
    assert scale.recipe.prior == get_scale("paper").recipe.prior


def test_another_encoder_comes_with_its_layer_and_its_crops():
    scale = scale_of("--scale=paper", "--encoder", "efficientnet_lite0", "--encoder_size", "192")
    assert scale.recipe.encoder.layer is None and scale.recipe.preprocess.encoder_size == 192
    assert scale_of("--scale=paper", "--encoder_weights", "x.pth").recipe.encoder.weights == "x.pth"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "3"], "--seeds"),
        (["--class_conditional=true"], "table4"),
        (["--prior_training.muon_learning_rate", "0.1"], "would not use"),
        (["--scale=paper", "--renderer_training.num_steps", "500"], "still train for masked_steps, 125000"),
        (["--seeds", "0,0", "--data", "shapes:num=40,size=64"], "each once"),
    ],
)
def test_what_cannot_be_set_is_said(capsys, words, said, tmp_path):
    assert main(["reproduce", "table1", "--out", str(tmp_path / "r"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_scale_in_a_settings_file_comes_too_late(tmp_path):
    (tmp_path / "s.yaml").write_text("scale: paper\n")
    with pytest.raises(DigitError, match="give it as an option"):
        scale_of(f"--config={tmp_path / 's.yaml'}")
