"""What people bring to a pipeline: pictures, arrays, class names, NumPy's numbers, settings; what they see of it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toy_images import PatchEncoder
from toy_pipeline import toy_pipeline

import digit
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, MismatchError
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample
from digit.runtime.files import read_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook

NUMBERED = ["0", "1", "10", "2"]


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(4, seed=1)


def forms(images):
    """The same images in the forms that notebooks hold."""
    array = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(picture) for picture in array]
    return {"floats": images.float() / 255, "array": array, "pictures": pictures, "tensors": list(images)}


def numbered() -> DigitPipeline:
    pipe = toy_pipeline(num_classes=4)
    pipe.classes = list(NUMBERED)
    return pipe


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("form", ["floats", "array", "pictures", "tensors"])
def test_images_of_every_form_give_the_same_tokens(images, form):
    pipe, brought = toy_pipeline(prior=False), forms(images)[form]
    assert torch.equal(pipe.vq.encode(brought), pipe.vq.encode(images))
    assert torch.equal(pipe.guess_labels(brought), pipe.guess_labels(images))
    assert torch.equal(pipe.complete(brought, seed=2), pipe.complete(images, seed=2))
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(5, 3)))
    assert torch.equal(tokenizer.encode(brought), tokenizer.encode(images))
    for found, expected in zip(tokenizer.encode_features(brought), tokenizer.encode_features(images), strict=True):
        assert torch.equal(found, expected)


def test_pictures_of_any_size_are_completed():
    pipe = toy_pipeline(prior=False)
    pictures = [Image.new("RGB", size, (90, 20, 200)) for size in ((16, 16), (40, 20), (17, 90))]
    completed = pipe.complete(pictures, labels="dog", output="pil")
    assert [picture.size for picture in completed] == [(16, 16)] * 3


@pytest.mark.parametrize("change", [torch.Tensor.long, lambda x: x.float(), lambda x: x > 9, lambda x: x[0]])
def test_wrong_images_are_refused_by_every_entry(images, change):
    pipe, wrong = toy_pipeline(prior=False), change(images)
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(5, 3)))
    entries = (pipe.complete, pipe.guess_labels, pipe.vq.encode, pipe.vq.features, tokenizer.encode, tokenizer.features)
    for entry in entries:
        with pytest.raises(DigitError, match="images are .*wanted RGB images"):
            entry(wrong)


def test_output_is_a_tensor_an_array_or_pictures(pipe):
    tensor = pipe.generate(2, seed=5)
    assert isinstance(tensor, torch.Tensor) and torch.equal(pipe.generate(2, seed=5, output="torch"), tensor)
    array = pipe.generate(2, seed=5, output="numpy")
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipe.generate(2, seed=5, output="pil")
    assert [picture.mode for picture in pictures] == ["RGB"] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), array)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_output_is_refused(pipe, images):
    for call in (pipe.generate, lambda **options: pipe.complete(images, **options)):
        with pytest.raises(DigitError, match="output is 'PIL': choose torch, numpy, pil"):
            call(output="PIL")


# ---------------------------------------------------------------- labels, seeds and counts


@pytest.mark.parametrize("labels", ["dog", ["dog"], 1, np.int64(1), np.array(["dog"]), torch.tensor([1]), "1"], ids=str)
def test_a_class_by_name_or_number(pipe, labels):
    tokens = pipe.generate_tokens(2, labels, seed=3)
    assert tokens["labels"].tolist() == [1, 1]
    assert torch.equal(tokens["vq"], pipe.generate_tokens(2, 1, seed=3)["vq"])


def test_numbers_are_names_where_classes_are_numbered(tmp_path):
    pipe = numbered()
    assert pipe.generate_tokens(labels=[2, 10])["labels"].tolist() == [3, 2]
    assert pipe.generate_tokens(labels=["2", "10"])["labels"].tolist() == [3, 2]
    assert pipe.generate_tokens(labels=ClassPositions([2, 3]))["labels"].tolist() == [2, 3]
    assert pipe.labels(4).tolist() == [0, 1, 2, 3]
    sample(pipe, tmp_path / "numbers", labels=[2, 10])
    assert read_json(tmp_path / "numbers" / "samples.json")["classes"] == ["2", "10"]
    sample(pipe, tmp_path / "numbers", labels=np.array(["2", "10"]))  # the same request
    with pytest.raises(DigitError, match="no class named 3"):
        pipe.generate(labels=[3])


def test_labels_of_completions_are_one_for_all_or_one_each(images):
    pipe = toy_pipeline(prior=False)
    one, each = pipe.complete(images, labels="dog"), pipe.complete(images, labels=[1, 1, 1, 1])
    assert torch.equal(one, each)
    with pytest.raises(DigitError, match="3 labels for 4 images: give one for all, or one for each"):
        pipe.complete(images, labels=[0, 1, 2])


@pytest.mark.parametrize(
    "request_, said",
    [
        (dict(labels=[1.7]), "label is 1.7"),
        (dict(labels="dgo"), "did you mean dog"),
        (dict(labels=True), "label is True"),
        (dict(labels=[0, 3]), "label 3 is out of range.*cat, dog, owl"),
        (dict(num=2, labels=[0, 1, 2]), "num is 2, but 3 labels were given"),
        (dict(num=0), "num is 0: it must be at least 1"),
        (dict(num=2.0), "num is 2.0: it must be a whole number"),
        (dict(num=True), "num is True"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(seed="1"), "seed is '1'"),
        (dict(seed=None), "seed is None"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_requests_are_refused_by_every_entry(pipe, tmp_path, request_, said):
    for entry in (pipe.generate, pipe.generate_tokens, pipe.stream, lambda **r: sample(pipe, tmp_path / "s", **r)):
        with pytest.raises(DigitError, match=said) as caught:
            entry(**request_)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_seed_of_numpy_does_not_overflow(pipe, tmp_path):
    last = 2**32 - 1
    assert torch.equal(pipe.generate(2, seed=np.uint32(last)), pipe.generate(2, seed=last))
    sample(pipe, tmp_path, np.int64(2), seed=np.uint32(last))
    assert read_json(tmp_path / "samples.json")["seed"] == last


def test_labels_of_an_unconditional_pipeline_are_refused():
    with pytest.raises(DigitError, match="unconditional: leave them out"):
        toy_pipeline(num_classes=0).generate(labels="dog")


# ---------------------------------------------------------------- tokens


def test_tokens_of_any_integer_type(pipe):
    tokens = pipe.generate_tokens(2, seed=3)
    for change in (torch.Tensor.int, torch.Tensor.byte, torch.Tensor.numpy, torch.Tensor.tolist, list):
        assert torch.equal(pipe.decode(change(tokens["vq"])), pipe.decode(tokens["vq"]))
        prefix = change(tokens["discriminative"])
        assert torch.equal(pipe.render(prefix, seed=3), pipe.render(tokens["discriminative"], seed=3))
        torch.testing.assert_close(pipe.prior(prefix), pipe.prior(tokens["discriminative"]))
        logits = pipe.renderer(change(tokens["vq"]), prefix=prefix)
        torch.testing.assert_close(logits, pipe.renderer(tokens["vq"], prefix=tokens["discriminative"]))


def test_wrong_tokens_are_refused_by_every_entry(pipe):
    tokens = pipe.generate_tokens(2)
    entries = {"vq": (pipe.decode, pipe.vq.embed), "discriminative": (pipe.render, pipe.render_tokens, pipe.prior)}
    for kind, calls in entries.items():
        for call in calls:
            with pytest.raises(DigitError, match="tokens are float32: give integers"):
                call(tokens[kind].float())
            with pytest.raises(MismatchError, match="run from .* to .*they are of another model"):
                call(tokens[kind] + 50)
            with pytest.raises(MismatchError, match="run from -1"):
                call(torch.full_like(tokens[kind], -1))
    with pytest.raises(MismatchError, match=r"shape \(2, 3\), the renderer takes \(B, 4\)"):
        pipe.render(tokens["discriminative"][:, :3])
    with pytest.raises(MismatchError, match="its prefix knows 0 to 6"):
        pipe.renderer(tokens["vq"], prefix=tokens["discriminative"] + 7)
    with pytest.raises(MismatchError, match="labels run from 3 to 3, this model knows -1 to 2"):
        pipe.prior(tokens["discriminative"], labels=[3, 3])
    with pytest.raises(MismatchError, match=r"labels have shape \(1,\), wanted \(2,\)"):
        pipe.prior(tokens["discriminative"], labels=[1])


# ---------------------------------------------------------------- settings and devices


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes, settings, said",
    [
        ({}, dict(prior={"topk": 3}), r"no setting named prior.topk: did you mean prior.top_k"),
        ({}, dict(prior={"top_k": 2.5}), "prior.top_k is 2.5"),
        ({}, dict(top_k=3), "top_k belongs to a stage"),
        ({}, dict(renderer={"num_steps": 4}), "renderer.num_steps is given, but this renderer is next_token"),
        ({}, dict(prior={"choice_temperature": 4}), "prior.choice_temperature is given, but this prior is next_token"),
        (dict(prior=False), dict(prior={"top_k": 3}), "prior.top_k is given, but this pipeline has no prior"),
    ],
)
def test_settings_that_are_wrong_or_would_be_ignored_are_refused(changes, settings, said):
    with pytest.raises(DigitError, match=said):
        toy_pipeline(**changes).generate(1, **settings)


def test_a_masked_renderer_takes_its_steps():
    assert len(toy_pipeline(masked=True).generate(1, renderer={"num_steps": 2})) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_device_that_is_not_there_is_refused(pipe, device):
    for move in (pipe.to, pipe.vq.to, DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(5, 3))).to):
        with pytest.raises(DigitError, match="device is cuda.*, but torch sees no GPU: choose cpu"):
            move(device)
    for name, said in (("cudda", "no device named 'cudda'"), ("meta", "device is meta: choose cpu or cuda")):
        with pytest.raises(DigitError, match=said):
            pipe.to(name)


# ---------------------------------------------------------------- folders, and what one sees


def test_a_home_folder_is_one_in_every_entry(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    toy_pipeline(prior=False).save_pretrained("~/pipe")
    again = DigitPipeline.from_pretrained("~/pipe")
    sample(again, "~/samples", 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pipe", "samples"]
    with pytest.raises(DigitError, match="no such path: ~nobody-of-this-name"):
        DigitPipeline.from_pretrained("~nobody-of-this-name/pipe")
    with pytest.raises(DigitError, match="a path is ''"):
        DigitPipeline.from_pretrained("")


def test_what_a_notebook_shows(pipe):
    lines = repr(pipe).splitlines()
    assert lines[0] == "DigitPipeline on cpu: 16 x 16 images, 3 classes: cat, dog, owl"
    assert lines[1] == "  vq         VQTokenizer(16 x 16 images, 4 x 4 tokens of 11 codes)"
    assert lines[2].startswith("  prior      SequenceModel(next_token, 0.0 M parameters)") and len(lines) == 4
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(5, 3)))
    assert repr(tokenizer) == "DiscriminativeTokenizer(patches, 4 x 4 tokens of 5 codes)"
    assert repr(tokenizer.codebook) == "Codebook(5 codes of 3 features, fitted on an encoder that is not recorded)"
    assert "top_k=200" in repr(pipe.sampling)


def test_the_public_names_show_without_torch():
    assert {"DigitPipeline", "__version__"} <= set(dir(digit))
    code = "import digit, sys; assert 'DigitPipeline' in dir(digit) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_without_a_class_are_sampled_where_training_knew_some(tmp_path):
    pipe = toy_pipeline()
    with pytest.raises(DigitError, match="trained with a class for every image"):
        pipe.generate(2, labels="none")
    pipe.info["num_unlabelled"] = 5
    tokens = pipe.generate_tokens(2, labels=["none", 1], seed=3)
    assert tokens["labels"].tolist() == [-1, 1]
    sample(pipe, tmp_path, 2, labels=["none", 1], seed=3)
    assert read_json(tmp_path / "samples.json")["classes"] == [None, pipe.classes[1]]
    pipe.save_pretrained(tmp_path / "pipeline")
    again = DigitPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(again.generate_tokens(2, labels=["none", 1], seed=3)["vq"], tokens["vq"])


def test_the_authors_repository_is_no_folder_and_says_who_fetches_it():
    with pytest.raises(DigitError, match="released_pipeline"):
        DigitPipeline.from_pretrained("DAMO-NLP-SG/DiGIT")


def test_crops_of_another_size_than_the_vqgan_takes_are_refused():
    whole = toy_pipeline()
    with pytest.raises(DigitError, match="pixels of the VQGAN is 16, of the crops 8"):
        DigitPipeline(vq=whole.vq, renderer=whole.renderer, preprocess=PreprocessConfig(image_size=8))


def test_the_path_of_the_codebook_has_its_own_size():
    whole, preprocess = toy_pipeline(), PreprocessConfig(path="released_kmeans", image_size=256, encoder_size=16)
    pipe = DigitPipeline(vq=whole.vq, renderer=whole.renderer, preprocess=preprocess)
    assert pipe.image_size == 16
