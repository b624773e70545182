"""Plans: memory against a real step, FLOPs against a count by hand, and advice that works when followed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import tiny_recipe

from digit.cli import main
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.planning import stages
from digit.planning.machines import GPUS, Machine, get_gpu
from digit.planning.memory import CPU_FRAGMENTATION, LiveMemory, blank_batch, training_memory
from digit.planning.report import dollars, notes
from digit.planning.stages import Order, Planner
from digit.planning.work import Work
from digit.runs.recipes import get_recipe, with_settings
from digit.runs.report import num_judged, num_shown
from digit.sampling.config import SamplingConfig, StageSampling
from digit.training.config import TrainConfig

PRIOR = SequenceConfig(vocab_size=512, target_len=64, depth=3, embed_dim=128, num_heads=4, norm="post")
RENDERER = SequenceConfig(
    vocab_size=256, target_len=64, prefix_vocab_size=512, prefix_len=64, depth=3, embed_dim=128, num_heads=4, norm="pre"
)
MASKED = replace(RENDERER, masked=True)
TRAINING = TrainConfig(num_steps=10, batch_size=16, precision="bf16")
CPU = Machine(
    name="a CPU", memory=2.0**34, peaks={"bf16": 4e11}, bandwidth=3e10, price=0.0, cores=2, gpu=False
)  # fmt: skip
REAL_STEP = """
import json, sys
from pathlib import Path
from digit.planning.memory import blank_batch
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.training.sequence import SequenceUpdate
from digit.training.config import TrainConfig
model, training = json.loads(sys.argv[1])
def update(cfg, training):
    batch = blank_batch(cfg, training.batch_size, "cpu")
    return SequenceUpdate(SequenceModel(cfg).train(), lambda step: batch, training)
cfg, training = SequenceConfig(**model), TrainConfig(**training)
update(SequenceConfig(**model | {"depth": 1}), TrainConfig(batch_size=2))(0)  # libraries
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before = status("VmRSS")
step = update(cfg, training)
step(0), step(1)
print(status("VmHWM") - before)
"""


def test_live_memory_counts_storages_once_and_forgets_them():
    with LiveMemory() as memory:
        x = torch.zeros(1000)
        y = x.view(10, 100).t()  # the same storage
        assert memory.live == 4000
        z = x + 1
        assert memory.live == memory.peak == 8000
        del x
        assert memory.live == 8000  # y is there
        del y, z
        assert memory.live == 0 and memory.peak == 8000


@pytest.mark.parametrize("cfg", [PRIOR, RENDERER, MASKED], ids=["prior", "renderer", "masked"])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_weights_moments_and_average_stay_between_steps(cfg, gpu):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SequenceModel(cfg).parameters())
    plain = training_memory(cfg, TRAINING, gpu=gpu)
    averaged = training_memory(cfg, replace(TRAINING, ema_decay=0.9), gpu=gpu)
    assert plain.weights == pytest.approx(12 * parameters, rel=0.02)  # float32 weights and two moments
    assert averaged.weights - plain.weights == pytest.approx(4 * parameters, rel=0.02)
    assert plain.peak > plain.weights


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_networks_of_code_losses_take_memory(gpu):
    width, dim = PRIOR.embed_dim, 48
    with_next = replace(TRAINING, next_code_weight=1.0)
    plain = training_memory(PRIOR, TRAINING, gpu=gpu)
    losses = training_memory(PRIOR, with_next, gpu=gpu, code_dim=dim)
    parameters = width * width + width + width * dim + dim
    assert losses.weights - plain.weights == pytest.approx(12 * parameters + 4 * PRIOR.vocab_size * dim, rel=0.02)
    assert losses.peak > plain.peak


def test_accumulation_checkpointing_and_half_precision_save_memory():
    def peak(**changes):
        return training_memory(RENDERER, replace(TRAINING, batch_size=64, **changes)).peak

    whole = peak()
    assert peak(accumulate=8) < 0.4 * whole and peak(checkpoint_activations=True) < 0.7 * whole
    assert whole < peak(precision="fp32")


def test_memory_grows_with_the_batch_in_proportion():
    peaks = [training_memory(PRIOR, replace(TRAINING, batch_size=n)).peak for n in (32, 64, 96)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02)


def test_gpu_keeps_what_cuda_autocast_keeps():
    """Counts one block by hand: bytes that its backward pass needs, per position and channel."""
    deep = [training_memory(replace(RENDERER, depth=n, dropout=0.1), replace(TRAINING, batch_size=64)) for n in (6, 10)]
    positions = 64 * (RENDERER.prefix_len + RENDERER.target_len)
    block = (deep[1].peak - deep[0].peak - (deep[1].weights - deep[0].weights)) / 4 / positions / RENDERER.embed_dim
    # bf16: two norm outputs 4, q k v 6, attention's output 2, MLP's hidden layer before and after GELU 16; float32: two
    # inputs of norms 8; dropout's masks 2; bf16 weights, gradients and the logsumexp are small here
    assert 36 <= block <= 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and wants glibc")
def test_predicted_memory_is_what_a_real_step_takes():
    """malloc returns blocks to the system at once here, so resident memory is live memory (no fragmentation)."""
    model = dict(vocab_size=4096, target_len=128, depth=3, embed_dim=256, num_heads=4, norm="post")
    training = dict(batch_size=24, precision="auto")
    script = [sys.executable, "-c", REAL_STEP, json.dumps([model, training])]
    shown = subprocess.run(script, capture_output=True, text=True, check=True, env=environment())
    predicted = training_memory(SequenceConfig(**model), TrainConfig(**training), gpu=False).peak / CPU_FRAGMENTATION
    assert predicted == pytest.approx(int(shown.stdout), rel=0.1)


def environment() -> dict[str, str]:
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cfg", [PRIOR, RENDERER, MASKED], ids=["prior", "renderer", "masked"])
def test_predicted_memory_is_what_a_gpu_allocates(cfg):
    from digit.training.sequence import SequenceUpdate

    cfg, training = replace(cfg, embed_dim=512, num_heads=8, depth=6), replace(TRAINING, batch_size=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch = blank_batch(cfg, training.batch_size, "cuda")
    update = SequenceUpdate(SequenceModel(cfg).cuda().train(), lambda step: batch, training)
    update(0), update(1)
    measured = torch.cuda.max_memory_allocated() - before
    assert training_memory(cfg, training).peak == pytest.approx(measured, rel=0.1)


def test_work_of_the_paper_s_recipe():
    work = Work(get_recipe("digit_base"))
    assert (work.num_tokens, work.dim) == (256, 768)
    tokens, dim = 261, 768  # patches, class and registers; ten of twelve blocks
    by_hand = 10 * (2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim) + 2 * 256 * 3 * 14**2 * dim
    assert work.encoder.flops == pytest.approx(by_hand, rel=0.01)
    assert work.vq_encoder.weights + work.vq_decoder.weights == pytest.approx(54e6, rel=0.05)


def test_plan_of_the_paper_s_base_model():
    planner = Planner(get_recipe("digit_base"), replace(get_gpu("h100"), count=8), Order(reuse=frozenset(["vqgan"])))
    names = [stage.name for stage in planner.stages]
    assert names == ["features", "codebook", "tokens", "prior", "renderer", "sampling", "report"]
    prior = planner.stages[3]
    # 6 x 219 M x 256 positions x 256 M images at 40% of 8 x 989 TFLOP/s
    assert prior.seconds == pytest.approx(6 * 219e6 * 256 * 125_000 * 2048 / (8 * 989e12 * 0.4), rel=0.1)
    assert planner.store_bytes == 100 * (2 * (256 + 256) + 4) * 1_281_167  # 100 crops an image
    assert all(stage.memory <= planner.machine.usable for stage in planner.stages)  # as committed
    recipe = planner.recipe
    whole = replace(recipe, renderer_training=replace(recipe.renderer_training, accumulate=1))
    renderer = Planner(whole, planner.machine, planner.order).training("renderer")
    assert renderer.memory > planner.machine.usable and "renderer_training.accumulate 2" in renderer.advice[0]
    assert "checkpoint_activations" in renderer.advice[1]


def test_advice_is_the_fewest_micro_batches_that_fit_and_following_it_fits():
    recipe = tiny_recipe()
    recipe = replace(recipe, prior_training=replace(recipe.prior_training, batch_size=64))
    order = Order(images=1000)
    least = Planner(recipe, GPUS["h100"], order)
    whole, half = (least.memory("prior", replace(recipe.prior_training, accumulate=n)).peak for n in (1, 2))
    machine = replace(GPUS["h100"], memory=(whole + half) / 2 / 0.92)
    advice = Planner(recipe, machine, order).training("prior").advice
    assert "--prior_training.accumulate 2" in advice[0]
    followed = replace(recipe, prior_training=replace(recipe.prior_training, accumulate=2))
    assert not Planner(followed, machine, order).training("prior").advice
    hopeless = Planner(recipe, replace(machine, memory=1e5), order).training("prior")
    assert "does not fit with any number of micro-batches" in hopeless.advice[0]


def test_more_images_take_more_where_they_are_seen():
    few, many = (Planner(tiny_recipe(), CPU, Order(images=n)) for n in (10_000, 1_000_000))
    assert many.tokens().seconds == pytest.approx(100 * few.tokens().seconds)
    assert many.store_bytes == 100 * few.store_bytes
    assert many.training_seconds("prior") == few.training_seconds("prior")  # the recipe's steps
    rows = Planner(tiny_recipe(), CPU, Order(images=1_000_000, epochs=2)).training_config("prior")
    assert rows.num_steps * rows.batch_size == pytest.approx(2e6, rel=0.01)


def test_an_epoch_is_a_pass_over_the_images_however_many_crops_are_stored():
    one, many = (Planner(tiny_recipe(crops_per_image=crops), CPU, Order(images=10_000, epochs=2)) for crops in (1, 8))
    assert one.training_config("prior").num_steps == many.training_config("prior").num_steps == 2500
    assert many.tokens().times["encoding"] == pytest.approx(8 * one.tokens().times["encoding"])
    text = "\n".join(notes(many))
    assert "prior sees every image 2 times, each of its 8 crops 0.25 times" in text
    assert "renderer sees every image 2 times, always the same crop" in "\n".join(notes(one))


def test_fresh_crops_cost_encoding_of_their_role_and_decoding():
    machine, order = replace(get_gpu("h100"), count=8), Order(reuse=frozenset(["vqgan"]))
    stored, fresh = (
        Planner(replace(get_recipe("digit_base"), training_crops=crops, crops_per_image=1), machine, order)
        for crops in ("stored", "fresh")
    )
    work, images = fresh.work, 125_000 * 2048
    encoding = work.encoder.flops / (0.6 * 67e12 * 8) + work.nearest_flops / (0.5 * 67e12 * 8)  # shares of fp32
    assert fresh.encoding_seconds("prior") == pytest.approx(images * encoding)
    vq = work.vq_encoder.flops / machine.rate("convolutions")
    assert fresh.encoding_seconds("renderer") == pytest.approx(2 * images * (encoding + vq))  # 400 epochs
    cfg = fresh.training_config("vq_ar")
    assert fresh.encoding_seconds("vq_ar") == pytest.approx(vq * cfg.num_steps * cfg.batch_size)
    for name in ("prior", "renderer"):
        extra = fresh.training_seconds(name) - stored.training_seconds(name)
        assert extra == pytest.approx(fresh.encoding_seconds(name))
    slow = Planner(fresh.recipe, replace(machine, cores=0.1), order)
    times = slow.training_times("prior")
    assert max(times, key=times.__getitem__) == "JPEG decoding"
    assert stored.encoding_seconds("prior") == 0


def test_notes_on_fresh_crops_and_the_tokenizers_beside_training():
    stored, fresh = (Planner(tiny_recipe(training_crops=c), CPU, Order(images=1000)) for c in ("stored", "fresh"))
    assert fresh.training("prior").memory > stored.training("prior").memory
    assert "each time a new crop" in "\n".join(notes(fresh)) and "validation and probes" in "\n".join(notes(fresh))


def test_vq_tokens_of_another_store_take_neither_time_nor_room():
    both, one = (Planner(tiny_recipe(), CPU, Order(images=1000, reuse=frozenset(r))) for r in ((), ("vq_tokens",)))
    assert (both.store_bytes, one.store_bytes) == (1000 * (2 * (4 + 16) + 4), 1000 * (2 * 4 + 4))
    vq = both.work.vq_encoder.flops * 1000 / CPU.rate("convolutions")
    assert both.tokens().times["encoding"] - one.tokens().times["encoding"] == pytest.approx(vq)


def test_sampling_takes_the_time_of_its_models_and_images_alone():
    planner = Planner(
        replace(tiny_recipe(), sampling=SamplingConfig(batch_size=8)), CPU, Order(images=1000, samples=40)
    )

    def seconds(samples, *names):
        return max(planner.sampling_times(samples, names).values())

    assert seconds(80, "prior", "renderer") == pytest.approx(2 * seconds(40, "prior", "renderer"))
    assert seconds(40, "vq_ar") < seconds(40, "prior", "renderer")
    report = num_shown(0) + num_judged(1000)
    assert planner.sampling().seconds == pytest.approx(seconds(report + 40, "prior", "renderer"))


def test_batch_that_devices_cannot_share_is_refused():
    machine = replace(GPUS["a100"], count=3)
    with pytest.raises(DigitError, match="batch_size 8 does not split into 3"):
        Planner(tiny_recipe(), machine, Order()).training("prior")


def fails(capsys, *argv: str) -> str:
    assert main(["plan", *argv]) == 2
    return capsys.readouterr().err


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    options = ["--gpus", "2", "--gpu-memory", "40", "--price", "2", "--images", "1000000000", "--json", str(path)]
    assert main(["plan", "demo", *options]) == 0
    text = capsys.readouterr().out
    for word in (
        "demo: 1 G images on 2 x H100",
        "limited by",
        "GPU-hours",
        "tokens",
        "sampling",
        "total",
        "token store",
    ):
        assert word in text, text
    plan = json.loads(path.read_text())
    assert plan["machine"]["count"] == 2 and all(stage["fits"] for stage in plan["stages"])
    for stage in plan["stages"]:
        assert stage["dollars"] == pytest.approx(2 * stage["gpu_hours"])
        assert stage["seconds"] == pytest.approx(max(stage["seconds_by_cause"].values()))


def test_command_names_mistakes(capsys):
    assert "choose one of" in fails(capsys, "nosuch") and "digit_base" in fails(capsys, "nosuch")
    assert "gpus is 0" in fails(capsys, "demo", "--gpus", "0")
    assert "no GPU named tpu" in fails(capsys, "demo", "--gpu", "tpu")
    assert "images is 0" in fails(capsys, "demo", "--gpus", "1", "--images", "0")
    assert "reuse names prior" in fails(capsys, "demo", "--gpus", "1", "--reuse", "prior")
    assert "--gpu-memory is -1.0" in fails(capsys, "demo", "--gpu-memory=-1")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--classes", "0"], "--classes is 0: give at least 1, or --class_conditional false for data without labels"),
        (["--classes", "-1"], "--classes is -1"),
        (["--class_conditional", "false", "--classes", "10"], "--classes is 10, but --class_conditional is false"),
        (["--images", "1"], "the data holds 1 image"),
        (["--images", "7"], "7 images give 448 patches"),
        (["--images", "99999999999999999999"], "--images is 99999999999999999999: it must be 1 to 1,000,000,000,000"),
        (["--samples", "-1"], "--samples is -1: it must be 0 to"),
        (["--epochs", "0"], "--epochs is 0.0: it must be above 0"),
        (["--epochs", "nan"], "--epochs is nan"),
        (["--gpus", "3"], "prior_training.batch_size 32 does not split into 3 equal micro-batches"),
        (["--gpus", "10000000"], "--gpus is 10000000: it must be 1 to 1,000,000"),
        (["--price=-1"], "--price is -1.0: it must be 0 to"),
        (["--price", "inf"], "--price is inf"),
        (["--cores", "0"], "--cores is 0.0: it must be above 0"),
        (["--gpu-memory", "1e9"], "--gpu-memory is 1000000000.0: it must be above 0 and at most 100,000"),
        (
            ["--reuse", "codebook", "--kmeans.tolerance", "0.1"],
            "--kmeans.tolerance is 0.1, which this run would",
        ),
    ],
)
def test_command_refuses_nonsense_and_what_fit_refuses(capsys, words, text):
    assert text in fails(capsys, "demo", "--gpus", "1", *words)


def test_sampling_is_that_of_the_report_and_what_is_asked_for_beside_it():
    report, more = (Planner(tiny_recipe(), CPU, Order(images=10_000, samples=n)).sampling() for n in (0, 50_000))
    assert report.what.startswith("600 images of the report, ")
    assert more.what.startswith("600 images of the report, 50,000 more, ")
    assert more.seconds > 50 * report.seconds
    few = Planner(tiny_recipe(), CPU, Order(images=100, num_classes=3)).sampling()
    assert few.what.startswith("130 images of the report")  # 3 rows of 10, and 100 judged


def test_a_report_judges_training_pictures_and_three_or_four_sets():
    plan = Planner(tiny_recipe(), CPU, Order(images=10_000)).report()
    assert plan.what == "2,000 training pictures and 3 sets of 500 judged"
    few = Planner(tiny_recipe(), CPU, Order(images=100)).report()
    assert few.what == "100 training pictures and 3 sets of 100 judged"
    assert few.seconds == pytest.approx(plan.seconds * 400 / 3500, rel=0.2)


def test_a_report_that_compares_guidance_samples_twice(monkeypatch):
    guided = SamplingConfig(prior=StageSampling(cfg_scale=1.5), renderer=StageSampling(), batch_size=8)
    plain = replace(guided, prior=StageSampling())
    prior = replace(tiny_recipe().prior, label_dropout=0.1)
    order, models = Order(images=1000, num_classes=3, samples=40), ("prior", "renderer")
    planner = Planner(tiny_recipe(prior=prior, sampling=guided), CPU, order)
    report = num_shown(3) + num_judged(1000)
    twice = planner.sampling_times(report + 40, models, guided)
    for cause, seconds in planner.sampling_times(report, models, plain).items():
        twice[cause] += seconds
    assert planner.sampling().times == pytest.approx(twice)
    assert f"{report} images of the report, {report} of them also without guidance, 40 more" in planner.sampling().what

    default = Planner(tiny_recipe(prior=prior, sampling=plain), CPU, order).sampling()
    assert (
        "also with guidance" in default.what
        and default.seconds > planner.sampling_times(report + 40, models, plain)[default.bottleneck]
    )
    assert "of them also" not in Planner(tiny_recipe(sampling=plain), CPU, order).sampling().what
    monkeypatch.setattr(stages, "OTHER_WAY_SECONDS", 0.0)  # judging the other way as well would take too long
    assert f"{num_shown(3)} of them also without guidance" in planner.sampling().what


@pytest.mark.parametrize(
    ("price", "shown"),
    [(0.0, "-"), (0.0001, "<$0.01"), (0.009, "<$0.01"), (0.01, "$0.01"), (1.5, "$1.50"), (12_345.6, "$12,346")],
)
def test_small_prices_are_not_rounded_to_nothing(price, shown):
    assert dollars(price) == shown


def test_no_cell_of_a_small_plan_is_rounded_to_nothing(capsys):
    assert main(["plan", "demo", "--gpus", "1", "--images", "3000"]) == 0
    words = capsys.readouterr().out.split()
    assert not {"0", "0.00", "0%", "$0.00", "0.0"} & set(words), words


def test_sizes_of_a_reused_part_are_read():
    recipe = replace(tiny_recipe(), vqgan=replace(tiny_recipe().vqgan, vocab_size=32))
    reuse = Order(images=1000, reuse=frozenset(["vqgan"]))
    assert Planner(recipe, CPU, reuse, chosen=["vqgan.vocab_size"]).work.vqgan.vocab_size == 32
    with pytest.raises(DigitError, match=r"vqgan_training.num_steps is 3, which this run would not use"):
        Planner(recipe, CPU, reuse, chosen=["vqgan_training.num_steps"])


def flops_of(planner, model):
    training = getattr(planner.recipe, f"{model}_training")
    return planner.work.training_flops(model) * training.num_steps * training.batch_size


def prior_flops(planner):
    return flops_of(planner, "prior")


def models_flops(planner):
    return flops_of(planner, "prior") + flops_of(planner, "renderer")


def test_a_run_straight_to_pixels_plans_no_vq_tokens():
    both, straight = (Planner(get_recipe(name), CPU, Order(images=1000)) for name in ("paper_cifar", "cifar_pixels"))
    assert [stage.name for stage in straight.stages] == [
        "features", "codebook", "tokens", "prior", "renderer_pixels", "sampling", "report",
    ]  # fmt: skip
    assert straight.store_bytes == 1000 * (2 * 64 + 4) and both.store_bytes == 1000 * (2 * (16 + 64) + 4)
    renderer = straight.training("renderer_pixels")
    assert renderer.memory > 0 and renderer.bottleneck == "vqgan training"
    # the decoder has the FLOPs of the VQGAN's tuning, the prior those of both models
    cfg, work = get_recipe("paper_cifar"), both.work
    tuning = work.vqgan_training_flops * cfg.vqgan_training.num_steps * cfg.vqgan_training.batch_size
    training = straight.recipe.pixels_training
    spent = straight.work.training_flops("renderer_pixels") * training.num_steps * training.batch_size
    assert 0.9 < spent / tuning < 1.1
    assert 0.95 < prior_flops(straight) / models_flops(both) < 1.05
    assert 0.95 < models_flops(Planner(get_recipe("cifar"), CPU, Order(images=1000))) / models_flops(both) < 1.05
    with pytest.raises(DigitError, match="leave out --reuse_vq_tokens"):
        Planner(get_recipe("cifar_pixels"), CPU, Order(images=1000, reuse=frozenset({"vq_tokens"})))


def test_windows_cost_a_third():
    """Without the discriminator, which joins later."""
    settings = {"preprocess.image_size": 128, "pixels_training.adversarial_weight": 0.0}
    recipe = with_settings(get_recipe("cifar_pixels"), settings)
    windows = with_settings(recipe, {"pixels_training.window": 64, "pixels_training.whole_from": 1.0})
    half = with_settings(windows, {"pixels_training.whole_from": 0.5})
    whole, part, mixed = (
        Planner(each, CPU, Order(images=1000)).work.training_flops("renderer_pixels")
        for each in (recipe, windows, half)
    )
    assert 0.25 < part / whole < 0.4 and mixed == pytest.approx((whole + part) / 2)


def pixel_flops(changes):
    changes = {f"pixels_training.{name}": value for name, value in (changes | {"num_steps": 100}).items()}
    recipe = with_settings(get_recipe("cifar_pixels"), {"preprocess.image_size": 128} | changes)
    return Planner(recipe, CPU, Order(images=1000)).work.training_flops("renderer_pixels")


def test_a_discriminator_that_joins_late_sees_the_images_of_then():
    """Once whole images are decoded it costs as much as without windows; before, a quarter at half the side."""

    def discriminator(start, **windows):
        return pixel_flops({"adversarial_start": start} | windows) - pixel_flops({"adversarial_weight": 0.0} | windows)

    windows = {"window": 64, "whole_from": 0.6}
    assert discriminator(80, **windows) == pytest.approx(discriminator(80))
    per_step = discriminator(0) / 100
    assert discriminator(20, **windows) == pytest.approx(per_step * (40 / 4 + 40))


@pytest.mark.parametrize(("crop", "share"), [(0, 0.5 / 4 + 0.5), (96, (0.5 * 64**2 + 0.5 * 96**2) / 96**2), (32, 1.0)])
def test_the_perceptual_network_sees_no_more_than_what_is_decoded(crop, share):
    def vgg(**windows):
        without = {"perceptual": "none", "adversarial_weight": 0.0} | windows
        return pixel_flops(without | {"perceptual": "vgg", "perceptual_crop": crop}) - pixel_flops(without)

    assert vgg(window=64, whole_from=0.5) == pytest.approx(share * vgg())


def test_a_machine_without_bf16_samples_in_fp32():
    recipe = with_settings(tiny_recipe(), {"sampling.precision": "bf16"})
    half, emulated, full = (
        Planner(each, machine, Order(images=1000)).sampling()
        for each, machine in (
            (recipe, CPU),
            (recipe, replace(CPU, bf16=False)),
            (with_settings(recipe, {"sampling.precision": "fp32"}), CPU),
        )
    )
    assert emulated == full and emulated.what.endswith("fp32")
    assert half.memory < full.memory and half.times["memory bandwidth"] < full.times["memory bandwidth"]
