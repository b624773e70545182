"""Every table and figure of the paper, end to end at a size that means nothing but that it runs."""

import io
import json
from dataclasses import replace

import pytest
from PIL import Image
from tiny import tiny_recipe

from digit.errors import DigitError, MismatchError
from digit.evaluation.sweep import SweepConfig
from digit.metrics.intervals import Interval
from digit.reproduce import TARGETS, Scale, Study, build, get_scale, plan, reproduce
from digit.reproduce.claims import FAILS, HOLDS, UNDECIDED, seeds_claim, verdict
from digit.reproduce.experiment import Experiment, Outcome, Step, perform
from digit.reproduce.scales import SCALES, lengthened, pretrained
from digit.reproduce.splits import open_splits
from digit.runs.pretrain import PretrainConfig
from digit.runs.recipes import ModelSpec
from digit.tokenizers.encoders import EncoderConfig
from digit.training.ssl.train import SSLConfig

DATA = "shapes:num=60,size=32"


def micro() -> Scale:
    """Seconds for each target."""
    ssl = SSLConfig(num_steps=2, batch_size=8, warmup_steps=1)
    encoder = PretrainConfig(
        image_size=32, source_size=32, patch_size=16, depth=3, embed_dim=24, num_heads=2, training=ssl
    )
    recipe, larger = replace(tiny_recipe(), class_conditional=False), ModelSpec(depth=2, embed_dim=48, num_heads=2)
    return Scale(
        name="tiny",
        recipe=recipe,
        num_train=40,
        num_test=30,
        num_samples=16,
        seeds=(0, 1),
        num_stability=12,
        num_completed=8,
        num_swept=8,
        clusters=(6, 12),
        longer=lengthened(recipe),
        large=replace(recipe, prior=larger, renderer=larger),
        prefixes=(0.5, 0.75),
        sweep=SweepConfig(top_k=(2,), top_p=(0.5,)),
        encoders=pretrained(encoder)[:2],
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    return Study(DATA, micro(), tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "fig6"])  # fig6 has tests of its own
def test_a_target_leaves_results_a_table_and_pictures(study, target):
    outcome, folder = reproduce(target, study)
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == target and results["metrics"]
    assert results["summarised_by"]["hardware"]["cores"] >= 1 and all(
        "revision" in s for s in results["steps"].values()
    )
    assert results["scale"] == "tiny" and results["config"]["recipe"]["kmeans"]["num_clusters"] == 12
    assert (folder / "table.md").read_text().count("|") > 6 and "paper" in (folder / "table.md").read_text().lower()
    assert outcome.pictures and all(path.is_file() and path.stat().st_size > 1000 for path in outcome.pictures)


def test_other_codebooks_take_the_vq_tokens_of_the_base_run(study):
    base = study.out / "runs" / "base" / "tokens" / "vq.npy"
    others = [run / "tokens" / "vq.npy" for run in (study.out / "runs").glob("k*")]
    others += [run / "tokens" / "vq.npy" for run in (study.out / "runs").glob("encoder_*")]
    assert len(others) >= 3 and all(path.samefile(base) for path in others)


def test_a_second_run_reads_what_is_done(study, monkeypatch):
    reproduce("table1", study)
    again = Study(DATA, micro(), study.out)
    assert "done  stability" in plan(build("table1", again), again.out)
    monkeypatch.setattr(Study, "base", property(lambda self: pytest.fail("made again")))
    outcome, _ = reproduce("table1", again)
    assert "0.187" in outcome.table  # the paper's, beside ours


def test_a_step_of_an_older_version_is_made_again(tmp_path):
    made = []
    for version in (1, 1, 2):
        step = Step(name="s", seconds=1, make=lambda: made.append(1) or len(made), version=version)
        experiment = Experiment(title="t", steps=[step], summarise=lambda r, out: Outcome(table="|", metrics=r))
        perform(experiment, tmp_path, "x", {})
    assert len(made) == 2
    assert json.loads((tmp_path / "x" / "results.json").read_text())["metrics"] == {"s": 2}


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(buffer, "PNG")
    for split, labels in (("train", [0, 1, 0, 1]), ("test", [-1, -1]), ("validation", [1, 0, 1])):
        images = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
        features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
        table = pa.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    train, test, where = open_splits(str(tmp_path), None, 100)
    assert "the validation split" in where and "its test split has no labels" in where
    assert len(train) == 4 and len(test) == 3 and test.labels().tolist() == [1, 0, 1]


def test_table4_wants_classes_and_fig4a_weights(tmp_path):
    for k in range(20):
        Image.new("RGB", (32, 32), (10 * k, 0, 0)).save(tmp_path / f"{k}.png")
    with pytest.raises(DigitError, match="no classes"):
        build("table4", Study(str(tmp_path), micro(), tmp_path / "out"))
    scale = replace(micro(), encoders=(("MAE", EncoderConfig(name="mae_vitb16")),))
    with pytest.raises(DigitError, match="MAE=FILE"):
        build("fig4a", Study(DATA, scale, tmp_path / "out2"))
    named = scale.with_encoder_files({"MAE": "mae.pth"})
    assert named.encoders[0][1].weights == "mae.pth"
    with pytest.raises(DigitError, match="MoCo"):
        scale.with_encoder_files({"MoCo": "x.pth"})


def test_another_scale_in_the_same_folder_is_refused(study):
    with pytest.raises(MismatchError, match="num_samples = 16, now asked for 17"):
        Study(DATA, replace(micro(), num_samples=17), study.out)


def test_unknown_names_are_listed(study):
    with pytest.raises(DigitError, match="table1"):
        build("table9", study)
    with pytest.raises(DigitError, match="tiny, small, paper"):
        get_scale("huge")


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_builds(name):
    scale = get_scale(name)
    assert scale.name == name and not scale.recipe.class_conditional and scale.encoders


def test_splits(tmp_path):
    train, test, _ = open_splits(DATA, 40, 10)
    assert len(train) == 40 and len(test) == 10 and train.fingerprint != test.fingerprint
    for k in range(10):
        path = tmp_path / "flat" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    train, test, where = open_splits(str(tmp_path / "flat"), None, 100)
    assert where == f"every fifth image of {tmp_path / 'flat'}"
    keys = [{source.key(i) for i in range(len(source))} for source in (train, test)]
    assert len(keys[0]) == 8 and len(keys[1]) == 2 and not keys[0] & keys[1]


def test_verdicts():
    assert verdict(Interval(-1, -2, -0.5)) == HOLDS
    assert verdict(Interval(1, 0.5, 2)) == FAILS
    assert verdict(Interval(-1, -3, 1)) == UNDECIDED and verdict(None) == UNDECIDED
    better = seeds_claim([70.0, 71.0, 70.5], [60.0, 60.4, 61.0], lower_is_better=False)
    worse = seeds_claim([70.0, 71.0, 70.5], [60.0, 60.4, 61.0], lower_is_better=True)
    assert better["verdict"] == HOLDS and worse["verdict"] == FAILS
    assert seeds_claim([1.0], [9.0], lower_is_better=True)["verdict"] == UNDECIDED
