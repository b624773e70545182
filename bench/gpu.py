"""What bench/gpu.sh runs: each part a process of its own, and one file of all results, written after every part."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET = float(os.environ.get("BUDGET", 545))  # seconds of all parts together
NEEDED = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "jaxtyping": "jaxtyping"}
OUTPUT = 4000  # characters of a failed part's output that are kept
MACHINE = """
import json, torch
gpu = torch.cuda.is_available()
about = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
if gpu:
    p = torch.cuda.get_device_properties(0)
    about |= {"gpu": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count}
    about |= {"memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": p.L2_cache_size / 2**20}
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Part:
    """One process: what it runs, and after how many seconds it is stopped."""

    name: str
    limit: int
    command: tuple[str, ...]
    writes: bool = False
    """Whether it writes its result to the file that --json names; else each line that it prints is one in JSON."""


def parts(on_gpu: bool) -> list[Part]:
    """All parts, the most valuable first: whether the numbers are right, then what is slowest beside its target."""
    device, size, large = ("cuda", "base", "large") if on_gpu else ("cpu", "micro", "micro")

    def speed(part: str, size: str, limit: int, *more: str) -> Part:
        command = ("-m", "digit.benchmark", part, "--size", size, "--device", device, *more)
        return Part(f"{part}:{size}", limit, command, writes=True)

    chosen = [
        Part("values", 130, ("tests/cuda/values.py", device)),
        Part("paths", 70, ("tests/cuda/checks.py", device)),
        speed("sample", size, 110, "--repeats", "2"),
        speed("train", size, 90, "--repeats", "2"),
        Part("kernels", 50, ("bench/kernels.py", device)),
        speed("encode", size, 50, "--repeats", "3"),
        speed("kmeans", size, 60, "--repeats", "1"),
    ]
    if on_gpu:
        chosen += [speed("sample", large, 90, "--repeats", "1"), speed("train", large, 70, "--repeats", "1")]
    return chosen


def main(words: list[str]) -> int:
    """Runs the parts and prints a line for each. Returns the exit code: 1 where a part or a check failed."""
    started = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "parts": {}}
    on_gpu = "gpu" in report["machine"]
    path = Path(words[0]).absolute() if words else default_file(report["machine"].get("gpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{report['machine'].get('gpu', 'no GPU: the smallest sizes on the CPU')}; results: {path}")
    if missing := report["machine"]["missing"]:
        print(f"not installed: {', '.join(missing)}; what needs it fails below (pip install {' '.join(missing)})")
    all_parts = parts(on_gpu)
    if unknown := set(words[1:]) - {part.name for part in all_parts}:
        print(f"no part named {', '.join(sorted(unknown))}: choose of {', '.join(part.name for part in all_parts)}")
        return 2
    for part in all_parts:
        if words[1:] and part.name not in words[1:]:
            continue
        left = BUDGET - (time.monotonic() - started)
        done = report["parts"][part.name] = run(part, min(part.limit, left)) if left > 5 else {"failed": "no time left"}
        write(path, report)
        print(f"{part.name:<14}{done.get('seconds', 0):7.1f} s   {verdict(done)}")
    lines = targets(path) if on_gpu else []
    for part in missed(path) if on_gpu else []:
        left = BUDGET - (time.monotonic() - started)
        if left > 30:
            report["parts"][f"profile {part}"] = profile(part, min(60, left))
    report["targets"], report["seconds"] = lines, round(time.monotonic() - started, 1)
    write(path, report)
    print("\n".join(lines))
    return int(any(done.get("failed") or done.get("faults") for done in report["parts"].values()))


def machine() -> dict[str, Any]:
    """GPU, driver, versions, commit, and the packages that are missing."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
    }
    about["missing"] = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    for package in ("numpy", "triton", "pillow"):
        if importlib.util.find_spec({"pillow": "PIL"}.get(package, package)):
            about[package] = importlib.metadata.version(package)
    for name, command in {
        "driver": ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"),
        "commit": ("git", "rev-parse", "HEAD"),
    }.items():
        about[name] = output(command)
    found = output((sys.executable, "-c", MACHINE))
    return about | (json.loads(found.splitlines()[-1]) if found else {"torch": "torch cannot be imported"})


def output(command: tuple[str, ...]) -> str | None:
    """What a command prints; None where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def default_file(gpu: str | None) -> Path:
    """docs/results/h100.json for "NVIDIA H100 80GB HBM3"; without a GPU a temporary file."""
    if gpu is None:
        return Path(tempfile.mkdtemp()) / "cpu.json"
    return ROOT / "docs/results" / f"{gpu.removeprefix('NVIDIA ').split()[0].lower()}.json"


def run(part: Part, limit: float) -> dict[str, Any]:
    """Runs a part for at most `limit` seconds. Returns its result, or why it failed with the end of its output."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "result.json", Path(folder) / "output.txt"
        command = [sys.executable, *part.command, *(["--json", str(file)] if part.writes else [])]
        failed, seconds = timed(command, log, limit)
        text = log.read_text(encoding="utf-8", errors="replace")
        result = (read(file) if part.writes else json_lines(text)) or None
    done: dict[str, Any] = {"seconds": seconds, "result": result}
    if not part.writes:
        done["faults"] = sum(line.get("fault") is not None for line in result or [])
    return done | ({"failed": failed, "output": text[-OUTPUT:]} if failed else {})


def timed(command: list[str], log: Path, limit: float) -> tuple[str | None, float]:
    """Runs a command with its children, output to a file. Returns why it failed, or None, and its seconds."""
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            failed = None if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            failed = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return failed, round(time.monotonic() - began, 1)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def write(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file at once, so that it is whole whenever the machine goes away."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def verdict(done: dict[str, Any]) -> str:
    if done.get("failed"):
        last = done.get("output", "").strip().splitlines()
        return f"FAILED: {done['failed']}" + (f": {last[-1][:160]}" if last else "")
    faults = [
        f"{line['name']}: {line['fault']}"
        for line in done["result"] or []
        if isinstance(line, dict) and line.get("fault")
    ]
    return "\n    ".join(["ok" if not faults else f"{len(faults)} FAULTS", *faults])


def targets(path: Path, *more: str) -> list[str]:
    return (output((sys.executable, "-m", "digit.benchmark.targets", str(path), *more)) or "").splitlines()


def missed(path: Path) -> list[str]:
    """PART:SIZE of each that missed a target."""
    return targets(path, "--missed")


def profile(name: str, limit: float) -> dict[str, Any]:
    """The table of torch's profiler over one round of PART:SIZE."""
    part, size = name.split(":")
    with tempfile.TemporaryDirectory() as folder:
        table, log = Path(folder) / "profile.txt", Path(folder) / "output.txt"
        command = [sys.executable, "-m", "digit.benchmark", part, "--size", size, "--device", "cuda"]
        failed, seconds = timed([*command, "--profile", str(table)], log, limit)
        lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else None
        end = log.read_text(encoding="utf-8", errors="replace")[-OUTPUT:]
    return {"seconds": seconds, "result": lines} | ({"failed": failed, "output": end} if failed else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
