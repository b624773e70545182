"""The benchmark: floors do the work they claim, every part gives measurements, the GPU script runs without a GPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from digit.benchmark import floors, targets
from digit.benchmark.bench import PARTS, BenchConfig, run_bench
from digit.benchmark.clock import Timing, alternate, peak_memory
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import SIZES, get_size, micro
from digit.benchmark.table import number, table
from digit.benchmark.targets import H100, summary
from digit.cli import main
from digit.errors import DigitError
from digit.models.sequence import training_flops
from digit.models.vqgan import VQGAN
from digit.tokenizers.vq import VQTokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NOT_THERE = ("jsonargparse", "pyarrow", "rich", "scipy", "matplotlib", "huggingface_hub", "tensorboard", "yaml")


# -------------------------------------------------------------------- clock


def test_ratios_are_of_one_round_each():
    ours, floor = Timing((2.0, 4.0, 20.0)), Timing((1.0, 2.0, 10.0))  # the machine slows down: the ratio does not
    assert floor.over(ours) == 0.5
    assert (ours.median, ours.times(2).median, ours.plus(floor).seconds) == (4.0, 8.0, (3.0, 6.0, 30.0))


def test_cases_run_in_turn_after_a_warm_up():
    calls: list[str] = []
    times, peaks = alternate({name: partial(calls.append, name) for name in "ab"}, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert len(times["a"].seconds) == 2 and set(peaks) == {"a", "b"}
    assert len(alternate({"c": calls.clear}, 2, CPU, warm_up=False)[0]["c"].seconds) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_is_what_was_held_at_once():
    with peak_memory(CPU) as peak:
        block = torch.ones(32 * 2**20, dtype=torch.uint8)
        del block
    if peak.size is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 31 * 2**20 <= peak.size < 64 * 2**20


# -------------------------------------------------------------------- floors


@pytest.fixture()
def counted(monkeypatch):
    """Counts the FLOPs of a floor, whose products use the one kernel that torch can count."""
    plain = lambda self, x, weight, may_pack=False: partial(torch.nn.functional.linear, x, weight)  # noqa: E731
    monkeypatch.setattr(floors.Operands, "fastest", plain)

    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    return count


def test_training_floor_is_the_work_that_mfu_counts(counted):
    for name in ("prior", "renderer"):
        cfg = micro().sequence_config(name)
        floor = counted(floors.training(cfg, 3, CPU, torch.float32))
        skipped = 6 * 2 * 9 * cfg.embed_dim**2 * 3 * cfg.prefix_len  # last block: no rows of the prefix past attention
        assert floor == 3 * training_flops(cfg) - (skipped / 2 if cfg.prefix_len else 0)


def test_decoding_floor_grows_with_the_cache(counted):
    cfg = micro().sequence_config("prior")
    linears = 12 * cfg.depth * cfg.embed_dim**2 + cfg.embed_dim * cfg.vocab_size
    attention = 2 * cfg.depth * cfg.embed_dim * sum(range(1, cfg.target_len + 1))
    assert counted(floors.decoding(cfg, 2, CPU, torch.float32)) == 2 * 2 * (cfg.target_len * linears + attention)


def test_encoding_floor_counts_every_image(counted):
    size = micro()
    patches, length = 16, 16 + 5
    vit = size.vit
    linears = patches * 3 * 14 * 14 * vit.embed_dim + length * 12 * vit.kept_blocks * vit.embed_dim**2
    attention = 2 * vit.kept_blocks * length**2 * vit.embed_dim
    assert counted(floors.encoding(vit, 56, 8, 4, CPU, torch.float32)) == 8 * 2 * (linears + attention)


def test_refining_and_distance_floors(counted):
    cfg = micro().sequence_config("renderer_masked")
    length = cfg.prefix_len + 1 + cfg.target_len
    passes = counted(floors.refining(cfg, 2, 3, CPU, torch.float32))
    assert passes == 3 * counted(floors.refining(cfg, 2, 1, CPU, torch.float32))
    assert passes > 3 * 2 * 2 * 12 * (cfg.depth - 1) * length * cfg.embed_dim**2
    assert counted(floors.distances(100, 8, 4, 32, CPU, torch.float32)) == 2 * 100 * 8 * 4


def test_recorded_convolutions_are_the_decoders(counted):
    vq = VQTokenizer(VQGAN(micro().recipe.vqgan))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with floors.recorded_convolutions(vq.vqgan.decoder, torch.bfloat16) as recorded:
        vq.decode(tokens)
    with torch.no_grad():
        assert counted(lambda: [run() for run in recorded]) == counted(lambda: vq.decode(tokens)) > 0
        assert recorded[0]().dtype == torch.bfloat16
    assert not any(module._forward_hooks for module in vq.vqgan.modules())


def test_the_fastest_kernel_gives_the_product():
    operands = floors.Operands(CPU, torch.float32)
    weight = operands.weight(6, 8)
    torch.testing.assert_close(operands.product(4, weight)(), operands.input(4, 8) @ weight.T)


# -------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """JSON and text of one run of all parts."""
    path, said = tmp_path_factory.mktemp("bench") / "all.json", []
    run_bench(BenchConfig(size="micro", device="cpu", json=str(path)), said.append)
    return json.loads(path.read_text()), "\n".join(said)


def test_every_part_has_rates_and_floors(run):
    result, text = run
    assert {row["part"] for row in result["results"]} == set(PARTS)
    for row in result["results"]:
        assert row["rate_low"] <= row["rate"] <= row["rate_high"] and row["floor_rate"] > 0 and row["of_floor"] > 0
        assert row["case"] in text
    assert {row["precision"] for row in result["results"] if row["part"] == "sample"} == {"fp32", "bf16"}
    assert result["machine"]["cores"] and result["versions"]["torch"] and result["arguments"]["size"] == "micro"


def test_wholes_parts_waits_and_shares(run):
    rows = {(row["part"], row["case"], row["precision"]): row for row in run[0]["results"]}
    prior, step = rows["sample", "prior", "fp32"], rows["train", "step", "bf16"]
    assert prior["prefill_share"] + prior["steps_share"] + prior["sampling_share"] == pytest.approx(1, abs=0.2)
    assert prior["whole_over_parts"] > 0 and 0 < step["data_wait"] < 1 and 0 < step["mfu"] < 1


def test_tables_line_up():
    common = dict(part="data", precision="-", unit="images", time=Timing((1.0,)), floor=Timing((0.5,)))
    rows = [Measurement(case=case, count=count, **common) for case, count in (("a", 3), ("a long name", 12345))]
    lines = table(rows).splitlines()
    assert [line.index("images/s") for line in lines[1:]] == [line.index("images/s") for line in lines[1:]][:1] * 2
    assert "12,345 images/s" in lines[2] and "50%" in lines[2]
    assert [number(v) for v in (1234.5, 12.34, 0.51234)] == ["1,234", "12.3", "0.512"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["draw"], "no part of the benchmark named draw: choose one of sample"),
        (["--size", "huge"], "no benchmark size named huge: choose one of micro, small"),
        (["--precision", "int8"], "no precision named int8: choose one of fp32, bf16"),
        (["--repeats", "0"], "repeats is 0: at least 1"),
        (["data", "--size", "micro", "--images", "/nonexistent"], "/nonexistent holds no .jpg or .jpeg"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_reads_a_folder_of_images(tmp_path, capsys):
    from digit.benchmark.data import generated_jpeg

    (tmp_path / "a.jpg").write_bytes(generated_jpeg(0))
    assert main(["bench", "data", "--size", "micro", "--repeats", "1", "--images", str(tmp_path)]) == 0
    assert "JPEG to crop" in capsys.readouterr().out


def test_profiles_name_operators(tmp_path):
    path = tmp_path / "profile.txt"
    run_bench(BenchConfig(part="encode", size="micro", device="cpu", profile=str(path)), lambda text: None)
    assert "encode: fp32" in path.read_text() and "aten::" in path.read_text()


# -------------------------------------------------------------------- sizes and targets


def test_sizes_hold_the_shapes_that_are_asked_for():
    base, small = SIZES["base"](), get_size(None, CPU)
    assert (small.sequence_config("prior").depth, small.sequence_config("prior").embed_dim, small.batch) == (6, 384, 8)
    assert [p.name for p in small.points] == ["200k x 768, K=1024", "1.28M x 64, K=4096"]
    assert (base.batch, base.sequence_config("prior").vocab_size, base.sequence_config("renderer").prefix_len) == (
        128,
        8192,
        256,
    )
    assert base.vit.kept_blocks == 10 and base.points[0].name == "2.1M x 768, K=8192"
    assert get_size("micro", CPU, "bf16").precisions == ("bf16",)
    with pytest.raises(DigitError, match="no benchmark size"):
        get_size("huge", CPU)


def test_targets_find_their_values():
    cases = {(t.part, t.size): [] for t in H100}
    for t in H100:
        cases[t.part, t.size].append({"case": t.case, "precision": "bf16", t.field: t.threshold})
    runs = {key: {"results": rows} for key, rows in cases.items()}
    assert all(line.endswith("yes") for _, _, line in summary(runs))
    runs["kmeans", "base"]["results"][0]["fit_seconds"] = 11
    assert [t.part for t, value, line in summary(runs) if line.endswith("NO")] == ["kmeans"]
    assert all(line.endswith("not measured") for _, _, line in summary({}))


def test_targets_are_read_from_the_scripts_file(tmp_path, capsys, monkeypatch):
    row = {"case": "step", "precision": "bf16", "mfu": 0.4}
    parts = {
        "train:base": {"result": {"results": [row]}},
        "values": {"result": []},
        "sample:base": {"failed": "exit 1"},
    }
    (tmp_path / "x.json").write_text(json.dumps({"parts": parts}))
    for more, wanted in (([], "base, training MFU"), (["--missed"], "train:base\n")):
        monkeypatch.setattr(sys, "argv", ["targets", str(tmp_path / "x.json"), *more])
        assert targets.main() == 0
        out = capsys.readouterr().out
        assert out == wanted if more else out.count("not measured") == len(H100) - 1 and wanted in out


def test_target_cases_are_those_that_the_benchmark_names(run):
    made = {row["case"] for row in run[0]["results"]} | {p.name for p in SIZES["base"]().points}
    made |= {case.replace("56 px", "224 px") for case in made}
    assert {t.case for t in H100} <= made
    assert set(micro().precisions) >= set(replace(SIZES["base"]()).precisions)


# -------------------------------------------------------------------- scripts, start-up


def gpu_script(out: Path, *parts: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict]:
    env = os.environ | {"PYTHON": sys.executable} | variables
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(out), *parts]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="a bash script")
def test_gpu_script_needs_little_and_loses_one_part_alone(tmp_path):
    for name in NOT_THERE:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done, report = gpu_script(tmp_path / "out" / "x.json", PYTHONPATH=paths, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    parts, machine = report["parts"], report["machine"]
    assert list(parts) == ["values", "paths", "sample:micro", "train:micro", "kernels", "encode:micro", "kmeans:micro"]
    assert machine["missing"] == [] and {"torch", "numpy", "python", "commit", "driver"} <= set(machine)
    assert len(parts["values"]["result"]) >= 18 and len(parts["paths"]["result"]) >= 33
    assert {row["case"] for row in parts["sample:micro"]["result"]["results"]} >= {"images", "images masked"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="a bash script")
def test_gpu_script_keeps_what_failed_and_what_had_no_time(tmp_path):
    (tmp_path / "safetensors.py").write_text("raise ImportError('broken on this machine')\n")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done, report = gpu_script(tmp_path / "a.json", "encode:micro", "kernels", PYTHONPATH=paths)
    assert done.returncode == 1 and "FAILED: exit 1" in done.stdout
    assert "broken on this machine" in report["parts"]["encode:micro"]["output"]
    assert "failed" not in report["parts"]["kernels"]
    done, report = gpu_script(tmp_path / "b.json", "encode:micro", BUDGET="1")
    assert done.returncode == 1 and report["parts"] == {"encode:micro": {"failed": "no time left"}}
    done, report = gpu_script(tmp_path / "c.json", "everything")
    assert done.returncode == 2 and "no part named everything" in done.stdout and not report


@pytest.mark.parametrize("code", ["import digit", "from digit.cli import main; main(['--help'])"])
def test_start_up_imports_nothing_heavy(code):
    check = "sys.exit(', '.join({'torch', 'numpy', 'jsonargparse', 'PIL', 'scipy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; {check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_comparison_says_what_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")  # as where it is run as a script
    spec = importlib.util.spec_from_file_location("compare", ROOT / "bench/compare.py")
    compare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare", compare)
    spec.loader.exec_module(compare)
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "transformers" else name)
    path = tmp_path / "compare.json"
    argv = ["compare.py", "--size", "micro", "--only", "gpt2,released,pillow,sklearn", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert compare.main() == 0
    assert "gpt2: transformers is not installed (make env-bench); left out" in capsys.readouterr().out
    rows = json.loads(path.read_text())["results"]
    assert [row["case"].split()[0] for row in rows] == ["prior", "prior", "JPEG", "K-means"]
    assert all(row["ratio"] > 0 for row in rows)
