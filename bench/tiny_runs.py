"""Small runs of the real command line that bench/chaos.py, disk_faults.py and memory.py interrupt and measure.

A `Work` is one command: its arguments, its result and its progress. Results are compared as {name: value}, so that a
difference has a name: files as hashes, the log line by line without times.
"""

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from digit.runs.recipes import Recipe

LOG_EVERY = 7  # not a divisor of the steps between two checkpoints
CLOCK = ("images_per_second", "mfu", "data_wait", "seconds")  # entries of a log line that differ from run to run

# -------------------------------------------------------------------- processes


class Started:
    """A command that runs in its own process group; its output goes to files."""

    def __init__(self, pid: int, wait: Callable[[bool], int | None], out: Path, err: Path):
        self.pid, self._wait, self._out, self._err = pid, wait, out, err

    def poll(self) -> int | None:
        """Returns the exit code (negative: the signal that ended it), or None while it runs."""
        return self._wait(False)

    def wait(self) -> int:
        """Waits for the exit code."""
        code = self._wait(True)
        assert code is not None
        return code

    @property
    def stdout(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def group(self) -> list[int]:
        """Living processes of its group: itself and its child processes."""
        return [pid for pid, group, state in _processes() if group == self.pid and state != "Z"]


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yields (pid, process group, state) of every process, from /proc/PID/stat."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            yield int(folder.name), int(group), state


def start(words: Sequence[str], output: Path) -> Started:
    """Runs `digit WORDS` as a user would, with one thread; `output` names the files of its output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    out, err = (output.with_name(output.name + end) for end in (".out", ".err"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "digit", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    return Started(process.pid, lambda block: process.wait() if block else process.poll(), out, err)


def fork(words: Sequence[str], output: Path) -> Started:
    """As `start`, in a fork of this process that has everything imported: 0.1 s instead of 2 s. For short tests."""
    from digit.cli import main

    sys.argv = ["digit", *words]
    return forked(lambda: main(list(words)), output)


def forked(call: Callable[[], int | None], output: Path) -> Started:
    """Calls a function in a fork of this process; its return value is the exit code, None means 0."""
    output.parent.mkdir(parents=True, exist_ok=True)
    out, err = (output.with_name(output.name + end) for end in (".out", ".err"))
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        _replaced(call, out, err)
    ended: list[int] = []

    def wait(block: bool) -> int | None:
        if not ended:
            done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
            if done:
                ended.append(os.waitstatus_to_exitcode(status))
        return ended[0] if ended else None

    return Started(pid, wait, out, err)


def _replaced(call: Callable[[], int | None], out: Path, err: Path) -> NoReturn:
    """Runs in the fork: opens its own group and files, makes the call, and exits without returning to the caller."""
    code = 1
    try:
        os.setsid()
        for number, path in enumerate((Path(os.devnull), out, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
        code = call() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Imports what the commands import, without starting a thread, for `fork`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import jsonargparse  # noqa: F401
    import torch
    import torch.distributed.checkpoint

    with suppress(ImportError), redirect_stderr(io.StringIO()):
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    torch.set_num_threads(1)


Starter = Callable[[Sequence[str], Path], Started]


# -------------------------------------------------------------------- the runs


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Lengths of the commands in images and steps."""

    images: int = 3000
    """Images to tokenize."""
    steps: int = 1000
    save_every: int = 40
    samples: int = 1600
    sample_batch: int = 16
    start_images: int = 300
    """Images of the run that the other runs start from."""
    fitted: int = 500
    """Images of the codebook, whose features are recomputed in every iteration."""
    kmeans_iterations: int = 40


SHORT = Sizes(images=240, steps=160, save_every=20, samples=96, start_images=32, fitted=64, kmeans_iterations=4)
CLUSTERS, LITTLE_MEMORY = 64, 900_000  # clusters; bytes, too few for the features of Sizes.fitted images


@dataclass(frozen=True)
class Work:
    """One command. The functions take its output folder."""

    name: str
    words: Callable[[Path], list[str]]
    made: Callable[[Path], Path]  # folder of its files
    result: Callable[[Path], dict[str, Any]]
    progress: Callable[[Path], int]  # steps, rows or images so far (codebook: time of the last save); 0 at the start


def tiny_recipe() -> "Recipe":
    """32 px images, 2 x 2 discriminative and 4 x 4 VQ tokens, models of one block with dropout and EMA."""
    from digit.data.preprocess import PreprocessConfig
    from digit.models.vqgan import VQGANConfig
    from digit.runs.recipes import ModelSpec, Recipe, cpu_training
    from digit.tokenizers.encoders import EncoderConfig
    from digit.tokenizers.kmeans.config import KMeansConfig
    from digit.training.vqgan import GANConfig

    size = ModelSpec(depth=1, embed_dim=32, num_heads=2, dropout=0.1, label_dropout=0.1)
    training = replace(cpu_training(4, batch_size=16), accumulate=2, log_every=LOG_EVERY)
    return Recipe(
        name="tiny",
        preprocess=PreprocessConfig(image_size=32, encoder_size=32),
        encoder=EncoderConfig(name="efficientnet_lite0", input_size=32),
        kmeans=KMeansConfig(num_clusters=12, num_iterations=3),
        codebook_subset=1.0,
        vqgan=VQGANConfig(
            resolution=32, channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=8, vocab_size=16,
            num_groups=4,
        ),
        vqgan_training=GANConfig(num_steps=3, batch_size=4, perceptual="none", adversarial_start=1, codebook_start=1),
        prior=size,
        prior_training=training,
        renderer=replace(size, label_dropout=0.0),
        renderer_training=training,
        validation_fraction=0.1,
    )  # fmt: skip


def make_base(folder: Path, sizes: Sizes) -> None:
    """Makes the run from which the others take codebook, VQGAN, tokens and models, and its settings file."""
    if (
        not (folder / "run" / "pipeline" / "pipeline.json").exists()
        and forked(lambda: _make_base(folder, sizes), folder / "base").wait()
    ):
        raise RuntimeError(f"the run to start from failed:\n{(folder / 'base.err').read_text()}")


def _make_base(folder: Path, sizes: Sizes) -> None:
    import yaml

    from digit.runs.fit import Run, fit

    recipe = tiny_recipe()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(recipe)))))
    fit(Run(recipe, f"shapes:num={sizes.start_images},size=32", folder / "run"))


def works(base: Path, sizes: Sizes) -> dict[str, Work]:
    """Returns train, tokenize, codebook and sample, by name; `base` is the folder of `make_base`."""
    start_data, data, fitted_data = (
        f"shapes:num={num},size=32" for num in (sizes.start_images, sizes.images, sizes.fitted)
    )
    run, settings = base / "run", ["--recipe", "paper_small", "--config", str(base / "tiny.yaml")]
    reuse = {part: [f"--reuse_{part}", str(run / part)] for part in ("codebook", "vqgan", "tokens")}
    parts = reuse["codebook"] + reuse["vqgan"]
    training = options("prior_training", num_steps=sizes.steps, save_every=sizes.save_every)
    fitting = options("kmeans", num_clusters=CLUSTERS, num_iterations=sizes.kmeans_iterations)
    fitting += options("kmeans", memory_budget_bytes=LITTLE_MEMORY)
    train = Work(
        "train",
        lambda out: ["train", "prior", start_data, *settings, *training, *parts, *reuse["tokens"], "--out", str(out)],
        lambda out: out / "prior",
        trained,
        lambda out: max((line["step"] for line in log_lines(out / "prior" / "log.jsonl")), default=0),
    )
    tokenize = Work(
        "tokenize",
        lambda out: ["tokenize", data, *settings, *parts, "--out", str(out)],
        lambda out: out / "tokens",
        lambda out: hashes(out / "tokens"),
        lambda out: journal(out / "tokens"),
    )
    codebook = Work(
        "codebook",
        lambda out: ["codebook", fitted_data, *settings, *fitting, "--out", str(out)],
        lambda out: out / "codebook",
        fitted,
        lambda out: max((path.stat().st_mtime_ns for path in files(out / "codebook")), default=0),
    )
    sampling = ["--num", str(sizes.samples), "--batch_size", str(sizes.sample_batch)]
    sample = Work(
        "sample",
        lambda out: ["sample", "--from", str(run), *sampling, "--out", str(out)],
        lambda out: out,
        hashes,
        journal,
    )
    return {work.name: work for work in (train, tokenize, codebook, sample)}


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its result, and seconds until its first file and until its end."""

    result: dict[str, Any]
    ready: float
    length: float


def uninterrupted(work: Work, folder: Path, starter: Starter) -> Reference:
    """Makes the uninterrupted run. Raises RuntimeError with its output if it fails."""
    started = time.monotonic()
    process, ready = starter(work.words(folder), folder.with_name(f"{folder.name}.told")), None
    while process.poll() is None:
        if ready is None and work.made(folder).exists():
            ready = time.monotonic() - started
        time.sleep(0.005)
    length = time.monotonic() - started
    if code := process.wait():
        raise RuntimeError(f"{work.name} ended with {code}, uninterrupted:\n{process.stderr}")
    if ready is None or ready > 0.9 * length:  # everything is written at the end: the second half is certainly work
        ready = length / 2
    return Reference(work.result(folder), ready, length)


def options(group: str, **settings: Any) -> list[str]:
    """("a", b=1) -> ["--a.b", "1"]."""
    return [word for name, value in settings.items() for word in (f"--{group}.{name}", str(value))]


# -------------------------------------------------------------------- results


def files(folder: Path) -> list[Path]:
    """Every file below a folder; none if the folder vanishes meanwhile."""
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def is_temporary(name: str) -> bool:
    """Whether a file or folder is temporary; those begin with a dot."""
    return name.startswith(".") and name != ".lock"


def temporaries(folder: Path) -> list[str]:
    """Names of temporary files and folders, of this process or of a killed one."""
    temporary = []
    for _, folders, names in os.walk(folder):
        temporary += [name for name in (*folders, *names) if is_temporary(name)]
    return sorted(temporary)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a folder, without the empty lock file."""
    return {str(path.relative_to(folder)): sha256(path) for path in files(folder) if path.name != ".lock"}


def tensors(path: Path) -> dict[str, str]:
    """{name: dtype, shape and SHA-256} of a safetensors file, whose header may list them in any order."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {n: f"{a.dtype} {a.shape} {hashlib.sha256(a.tobytes()).hexdigest()}" for n, a in arrays.items()}


def journal(folder: Path) -> int:
    """Number of rows or images that the journals name; -1 when all is done."""
    if (folder / "manifest.json").exists() or (folder / "samples.json").exists():
        return -1
    done = 0
    for path in folder.glob("journal*.json"):
        with suppress(ValueError, FileNotFoundError):
            ranges = json.loads(path.read_text())["done"]
            done += sum(end - begin for begin, end in ranges)
    return done


def log_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl without times and notes; an incomplete last line is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            if "note" not in (line := json.loads(text)):
                lines.append(without_clock(line))
    return lines


def trained(out: Path) -> dict[str, Any]:
    """Weights and the last checkpoint's tensors by hash, the log and the TensorBoard curves line by line."""
    folder = out / "prior"
    result: dict[str, Any] = {"names": sorted(p.name for p in folder.iterdir() if p.name != ".lock")}
    result["model.safetensors"] = sha256(folder / "model.safetensors")
    newest = max((folder / "checkpoints").glob("step_*"))
    for path in newest.glob("*.safetensors"):
        result |= {f"{newest.name} {name}": value for name, value in tensors(path).items()}
    state = json.loads((newest / "state.json").read_text())
    result |= {f"{newest.name} {name}": value for name, value in without_clock(state).items()}
    result |= {f"log line {i}": line for i, line in enumerate(log_lines(folder / "log.jsonl"))}
    return result | {f"tensorboard {name}": points for name, points in curves(folder / "tensorboard").items()}


def fitted(out: Path) -> dict[str, Any]:
    """The codebook's files by hash, and its description without times."""
    path = out / "codebook" / "codebook.json"
    description = without_clock(json.loads(path.read_text()))
    return (
        hashes(path.parent) | {path.name: None} | {f"{path.name} {name}": value for name, value in description.items()}
    )


def without_clock(value: Any) -> Any:
    """JSON without entries that depend on the clock, at any depth."""
    if isinstance(value, dict):
        return {name: without_clock(entry) for name, entry in value.items() if name not in CLOCK}
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars, {tag: [(step, value)]}, without times; {} if TensorBoard is not installed."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports that the run was resumed
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag not in CLOCK
    }


def difference(result: dict[str, Any], reference: dict[str, Any]) -> str | None:
    """Describes the first difference between two results; None if they are equal."""
    for name in sorted(result.keys() | reference.keys()):
        if result.get(name) != reference.get(name):
            return f"{name} is {str(result.get(name))[:200]}, uninterrupted {str(reference.get(name))[:200]}"
    return None
