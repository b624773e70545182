"""Every row of the paper has a row of ours at the paper's scale, and no model is trained twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from digit.evaluation import paper
from digit.planning.work import num_parameters
from digit.reproduce import TARGETS, Study, build, get_scale
from digit.reproduce.tables import METHODS, methods_of, vq_only
from digit.reproduce.variants import changes_of, home, own_parts, recipe_of, same_model, shared_parts
from digit.runs.recipes import TokenSpace, digit_base, digit_large
from digit.runs.roles import get_role

DATA = "shapes:num=2000,size=64"  # enough patches for 16,000 codes


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    files = {"MAE": "a.pth", "MoCo": "b.pth", "iBOT": "c.pth"}
    scale = replace(get_scale("paper").with_encoder_files(files), num_test=10)
    return free_of_charge(Study(DATA, scale, tmp_path_factory.mktemp("paper")))


def free_of_charge(study: Study) -> Study:
    """The study without estimates of time, which take longer than the rest."""
    names = ("images", "parts", "model", "sampling", "reconstruction", "probe", "probe_itself")
    study.costs = SimpleNamespace(**{name: lambda *_args, **_options: 0.0 for name in names})
    return study


def steps(study: Study, target: str) -> list[str]:
    return [step.name for step in build(target, study).steps]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_builds_at_the_paper_scale_with_each_step_once(study, target):
    names = steps(study, target)
    assert len(names) == len(set(names))


def test_every_row_of_ours_in_the_paper_is_a_row_here(study):
    labels = {*methods_of(study), "validation data: DiGIT + VQ", "validation data: VQ only"}
    for rows in (paper.TABLE3_ROWS, paper.TABLE4_ROWS):
        assert {row.ours for row in rows if row.ours} <= labels
        assert all(row.ours for row in rows if row.method.startswith("DiGIT"))
    assert [row.ours for row in paper.TABLE2_ROWS if row.ours] == ["DiGIT", "DiGIT, large"]
    assert (len(paper.TABLE2_ROWS), len(paper.TABLE3_ROWS), len(paper.TABLE4_ROWS)) == (10, 14, 24)
    assert paper.TABLE3["DiGIT + AR"] == paper.FIG3A["+ longer training"]
    assert paper.TABLE3["DiGIT + AR, large"] == paper.FIG3A["+ larger model"]
    assert paper.TABLE3["VQ-only AR, own epochs"] == paper.FIG3A["VQ tokens"]
    assert set(paper.TABLE3) <= labels and set(paper.FIG3A) == set(list(paper.FIG3A))


def test_each_probe_and_the_parts_of_the_large_recipe_are_steps_of_their_own(study):
    """So that what was done before a kill is not repeated."""
    names = steps(study, "fig4a")
    for name in ("MAE", "MoCo", "iBOT"):
        first = names.index(f"encoder_{name}")
        assert names[first : first + 3] == [f"encoder_{name}", f"encoder_{name}_lp", f"encoder_{name}_ol"]
    names = steps(study, "fig3b")
    assert {"prior_k1024", "probe_k1024", "prior_k4096", "probe_k4096", "plain_prior_0_probe"} <= set(names)
    names = steps(study, "table3")
    assert names.index("large_parts") < names.index("large_plain_prior_0")


def test_the_baseline_is_there_by_epochs_and_by_compute(study):
    assert vq_only(study) == "VQ-only AR, own epochs"
    for target in ("table3", "table4", "fig3a"):
        kind = "class" if target == "table4" else "plain"
        assert {f"{kind}_vq_ar_epochs_0_samples", f"{kind}_vq_ar_0_samples"} <= set(steps(study, target))
    small = free_of_charge(Study("shapes:num=60,size=64", get_scale("tiny"), study.out / "tiny"))
    assert vq_only(small) == "VQ-only AR" and "VQ-only AR, own epochs" not in methods_of(small)
    assert "DiGIT + AR, large" not in methods_of(small)


def test_table_4_samples_with_the_renderers_of_table_3(study):
    third, fourth = set(steps(study, "table3")), set(steps(study, "table4"))
    shared = {"plain_renderer_0", "plain_renderer_masked_0", "large_plain_renderer_0", "golden", "floor"}
    assert shared <= third & fourth
    assert {"class_prior_0", "large_class_prior_0", "class_vq_ar_0"} <= fourth
    assert not any(name.startswith(("class_renderer_0", "class_renderer_masked_0")) for name in fourth - {*SAMPLES})
    assert home(study, "base", "renderer", True) == ("base", False)
    assert home(study, "base", "vq_ar", True) == ("base", True)


SAMPLES = ("class_renderer_0_samples", "class_renderer_masked_0_samples", "large_class_renderer_0_samples")


def test_figure_3a_trains_what_no_other_has(study):
    names = steps(study, "fig3a")
    trained = [name for name in names if name.endswith("_0") and name != "parts"]
    assert trained == [
        "plain_vq_ar_epochs_0", "plain_prior_0", "short_plain_renderer_0", "plain_renderer_0", "large_plain_prior_0",
        "large_plain_renderer_0", "plain_vq_ar_0",
    ]  # fmt: skip
    assert "plain_renderer_0_samples" in names and "short_plain_renderer_0_samples" in names


def test_the_variants_are_the_papers(study):
    epochs = {name: recipe_of(study, name).renderer_training.num_steps for name in ("base", "short", "longer", "large")}
    assert epochs == {"base": 250_000, "short": 125_000, "longer": 250_000, "large": 250_000}
    large = digit_large()
    assert recipe_of(study, "large").prior_training == large.prior_training
    assert recipe_of(study, "large").kmeans.num_clusters == 16_000
    assert recipe_of(study, "large").sampling.prior.top_k == 400
    assert shared_parts(study, "large") == ("vqgan",) and shared_parts(study, "short") == (
        "codebook",
        "vqgan",
        "tokens",
    )
    assert set(changes_of(study, "short")) == {"renderer_training"}
    assert own_parts(study, "short") == {}
    spaces = {"discriminative": TokenSpace(8192, 256), "vq": TokenSpace(1024, 256)}
    compared = recipe_of(study, "compared")
    assert num_parameters(compared.sequence_config("prior", spaces, num_classes=0)) / 1e6 == pytest.approx(39, rel=0.01)
    assert compared.prior_training.num_steps == 62_500  # 100 epochs


def test_what_decides_a_model():
    base = digit_base()
    assert same_model(base, replace(base, class_top_k=1, masked_steps=1), "renderer")
    assert not same_model(base, replace(base, masked_steps=1), "renderer_masked")
    assert not same_model(base, replace(base, prior=replace(base.prior, depth=2)), "vq_ar")  # it has its compute
    assert same_model(base, replace(base, prior=replace(base.prior, depth=2)), "vq_ar_epochs")
    assert not same_model(base, replace(base, kmeans=replace(base.kmeans, num_clusters=9)), "renderer")
    assert get_role("vq_ar_epochs").replaces == () and METHODS["VQ-only AR, own epochs"].renderer == "vq_ar_epochs"
