"""The judge's protocol on a stand-in network, and the classifier against scikit-learn."""

import weakref

import pytest
import torch

from digit.errors import DigitError, MismatchError
from digit.metrics.frechet import FeatureStats
from digit.metrics.judge import (
    JUDGE_INPUT_SIZE,
    METRIC,
    Judged,
    LinearClassifier,
    collect_features,
    collect_judged,
    fd,
    fit_linear_classifier,
    judge_input,
)


def _blobs(num=300, dim=8, classes=4, spread=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(num) % classes
    return centres[labels] + spread * torch.randn(num, dim, generator=generator), labels


def _channel_means(images):
    assert images.dtype == torch.uint8
    return images.float().mean((2, 3))


def test_names_of_the_protocol():
    assert METRIC == "fd_efficientnet_lite2" and "fid" not in METRIC
    assert JUDGE_INPUT_SIZE % 32 == 0


def test_features_do_not_depend_on_the_batch_size():
    images = torch.randint(0, 256, (10, 3, 20, 20), dtype=torch.uint8)
    whole = collect_features([images], _channel_means)
    parts = collect_features(images.split(3), _channel_means, total=10)
    assert whole.shape == (10, 3) and whole.dtype == torch.float32
    torch.testing.assert_close(parts, whole)


def test_judge_sees_its_own_size():
    seen = []
    collect_features([torch.zeros(2, 3, 40, 40, dtype=torch.uint8)], lambda x: seen.append(x.shape) or x[:, :, 0, 0])
    assert seen == [(2, 3, JUDGE_INPUT_SIZE, JUDGE_INPUT_SIZE)]
    collect_features([torch.zeros(2, 3, 40, 40, dtype=torch.uint8)], lambda x: seen.append(x.shape) or x[:, :, 0, 0],
                     input_size=None)  # fmt: skip
    assert seen[1] == (2, 3, 40, 40)


def test_resize_keeps_constants_averages_detail_and_leaves_the_right_size_alone():
    flat = torch.full((1, 3, 50, 70), 200, dtype=torch.uint8)
    assert (judge_input(flat, 32) == 200).all()
    stripes = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    stripes[..., ::2] = 255
    inner = judge_input(stripes, 64)[..., 8:-8, 8:-8].float()
    assert (inner - 127.5).abs().max() < 3, "antialiased: stripes of one pixel become grey"
    same = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert judge_input(same, 32) is same


def test_images_of_any_form_are_judged_alike():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = judge_input(images, 4)
    for brought in (images.float() / 255, images.numpy(), images.permute(0, 2, 3, 1).numpy(), list(images)):
        assert torch.equal(judge_input(brought, 4), expected)
    for wrong in (images.float(), images.long(), images > 9, images[0], images.float() * float("nan")):
        with pytest.raises(DigitError, match="images are"):
            judge_input(wrong, 4)


def test_labels_of_any_integer_type_and_no_fractions():
    features, labels = _blobs()
    expected = fit_linear_classifier(features, labels)
    for brought in (labels.int(), labels.numpy().astype("u1"), labels.tolist()):
        found = fit_linear_classifier(features, brought)
        assert torch.equal(found.weight, expected.weight)
        assert found.accuracy(features, brought) == expected.accuracy(features, labels)
    for wrong in (labels + 0.7, labels > 0, (labels + 0.7).numpy()):
        for call in (fit_linear_classifier, expected.accuracy):
            with pytest.raises(DigitError, match="labels are .*give integers"):
                call(features, wrong)


def test_fd_accepts_features_and_kept_statistics():
    a, b = _blobs()[0], _blobs(seed=1)[0] + 0.5
    assert fd(a, a) == pytest.approx(0.0, abs=1e-9)
    assert fd(a, b) == pytest.approx(fd(FeatureStats.of(a), b), rel=1e-12)
    assert fd(a, b) > fd(a, _blobs(seed=1)[0])


class _Corner:
    """A judge that sees means, the first pixel and sums."""

    name = "corner"

    def judge(self, images):
        x = images.float()
        return Judged(x.mean((2, 3)), x[:, :, 0, 0], x.sum((1, 2, 3))[:, None])


@pytest.mark.usefixtures("unchecked")
def test_collect_judged_keeps_everything_in_order():
    images = torch.randint(0, 256, (10, 3, 6, 6), dtype=torch.uint8)
    judged, whole = collect_judged(images.split(4), _Corner(), total=10), _Corner().judge(images)
    assert len(judged) == 10
    assert torch.equal(judged.pooled, whole.pooled)
    assert torch.equal(judged.spatial, whole.spatial) and torch.equal(judged.logits, whole.logits)
    with pytest.raises(DigitError, match="no images"):
        collect_judged([], _Corner())


@pytest.mark.usefixtures("unchecked")
def test_collect_judged_keeps_no_batch():
    alive: list[weakref.ref] = []

    def generated():
        for _ in range(20):
            images = torch.zeros(5, 3, 6, 6, dtype=torch.uint8)
            alive.append(weakref.ref(images))
            assert sum(batch() is not None for batch in alive) <= 2
            yield images

    assert len(collect_judged(generated(), _Corner())) == 100


def test_classifier_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    (features, labels), (test, test_labels) = _blobs(spread=2.0), _blobs(spread=2.0, seed=1)
    ours = fit_linear_classifier(features, labels, l2=0.01)
    x = (features - features.mean(0)) / features.std(0, unbiased=False)
    # scikit-learn minimises sum CE + ||W||^2 / (2 C): C = 1 / (N l2)
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * 0.01), tol=1e-8, max_iter=2000).fit(x.double(), labels)
    torch.testing.assert_close(ours.weight.double(), torch.from_numpy(theirs.coef_), rtol=1e-2, atol=1e-3)
    y = (test - features.mean(0)) / features.std(0, unbiased=False)
    assert (ours.predict(test).numpy() == theirs.predict(y.double())).mean() > 0.995
    assert 0.5 < ours.accuracy(test, test_labels) < 1.0


def test_separable_classes_are_learnt_whatever_the_scale():
    features, labels = _blobs(spread=0.1)
    features = features * torch.logspace(-4, 4, 8) + 1000
    features = torch.cat([features, torch.full((len(features), 1), 3.0)], 1)  # a constant feature must not hurt
    classifier = fit_linear_classifier(features.double(), labels.numpy())
    assert classifier.accuracy(features.double(), labels.numpy()) > 0.95
    assert torch.isfinite(classifier.logits(features)).all()


def test_fit_is_deterministic_and_works_under_inference_mode():
    features, labels = _blobs()
    with torch.inference_mode():
        first = fit_linear_classifier(features.clone(), labels)
    assert torch.equal(first.weight, fit_linear_classifier(features, labels).weight)


def test_save_and_load(tmp_path):
    features, labels = _blobs()
    classifier = fit_linear_classifier(features, labels, num_classes=6)
    assert classifier.weight.shape == (6, 8)
    classifier.save(tmp_path / "c.safetensors")
    assert torch.equal(LinearClassifier.load(tmp_path / "c.safetensors").logits(features), classifier.logits(features))
    with pytest.raises(DigitError):
        LinearClassifier.load(tmp_path / "missing.safetensors")


@pytest.mark.usefixtures("unchecked")
def test_misuse_says_what_to_do():
    features, labels = _blobs()
    with pytest.raises(DigitError, match="-1"):
        fit_linear_classifier(features, torch.full_like(labels, -1))
    with pytest.raises(DigitError, match="wanted 0 to 1"):
        fit_linear_classifier(features, labels, num_classes=2)
    with pytest.raises(DigitError, match="labels for"):
        fit_linear_classifier(features, labels[:5])
    with pytest.raises(DigitError, match="NaN"):
        fit_linear_classifier(features * float("nan"), labels)
    with pytest.raises(MismatchError, match="wants"):
        fit_linear_classifier(features, labels).predict(features[:, :3])
    with pytest.raises(DigitError, match="uint8"):
        judge_input(torch.full((1, 3, 8, 8), 2.0))
    with pytest.raises(DigitError, match="no images"):
        collect_features([], _channel_means)
    with pytest.raises(DigitError, match="pool"):
        collect_features([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], lambda x: x.float())
