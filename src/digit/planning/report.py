"""Prints a plan as a table with notes, or writes it as JSON."""

from dataclasses import asdict
from typing import Any

from digit.planning.machines import GPU_SAMPLING, GPU_SHARES, Machine
from digit.planning.stages import IMAGENET_BYTES, Planner, Stage, count, size

COLUMNS = ("stage", "what", "memory", "time", "GPU-hours", "cost", "share", "limited by")


def to_text(planner: Planner) -> str:
    """Formats the plan as a table, followed by notes."""
    machine, stages = planner.machine, planner.stages
    total = sum(stage.seconds for stage in stages)
    rows = [cells(stage, machine, total) for stage in stages]
    hours = total * machine.count / 3600
    money = dollars(hours * machine.price)
    rows.append(("total", "", "", duration(total), amount(hours * per_hour(machine)), money, "", ""))
    head = list(COLUMNS) if machine.gpu else ["core-hours" if c == "GPU-hours" else c for c in COLUMNS]
    title = (
        f"{planner.recipe.name}: {count(planner.order.images)} images on {machine.count} x {machine.name}, "
        f"{size(machine.usable)} of {size(machine.memory)} usable"
    )
    return "\n".join([title, "", *align([tuple(head), *rows]), "", *notes(planner)])


def cells(stage: Stage, machine: Machine, total: float) -> tuple[str, ...]:
    """Formats one stage as a row of the table."""
    hours = stage.seconds * machine.count / 3600
    memory = size(stage.memory) + (" !" if stage.memory > machine.usable else "")
    money, share = dollars(hours * machine.price), f"{stage.seconds / total:.0%}"
    shown = amount(hours * per_hour(machine))
    share = "<1%" if share == "0%" else share
    return stage.name, stage.what, memory, duration(stage.seconds), shown, money, share, stage.bottleneck


def per_hour(machine: Machine) -> float:
    """GPU-hours in one hour of a device; core-hours for a CPU."""
    return 1 if machine.gpu else machine.cores


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Pads the cells to columns of equal width, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (False, False, True, True, True, True, True, False)
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def notes(planner: Planner) -> list[str]:
    """Lists the bottleneck, stages that do not fit and settings that would, disk space, epochs and the uncertainty."""
    machine, stages, recipe, order = planner.machine, planner.stages, planner.recipe, planner.order
    slowest = max(stages, key=lambda stage: stage.seconds)
    lines = [
        f"bottleneck: {slowest.name}, {slowest.seconds / sum(s.seconds for s in stages):.0%} of the time, limited by "
        f"{slowest.bottleneck}"
    ]
    lines += [line for stage in stages for line in stage.advice]
    pixels = order.images * IMAGENET_BYTES
    lines.append(f"token store {size(planner.store_bytes)} on disk{store_use(planner)}")
    tokens = [stage for stage in stages if stage.name == "tokens"]
    reading = f"; tokenizing reads {size(pixels / tokens[0].seconds)} per second" if tokens else ""
    lines.append(f"images about {size(pixels)} on disk at ImageNet's mean file size{reading}")
    for name in recipe.model_names:
        cfg = planner.training_config(name)
        lines.append(f"{name} {passes(planner, name, cfg.num_steps * cfg.batch_size / order.images)}")
    if planner.fit_cost.streamed and "codebook" not in order.reuse:
        lines.append(
            "the features exceed the quantizer's memory budget: every iteration encodes the images again "
            f"(--{recipe.quantizer}.memory_budget_bytes)"
        )
    num_points = planner.fit_cost.num_points
    needed = num_points / planner.work.num_tokens / order.images
    if "codebook" not in order.reuse and needed < 0.5 * recipe.codebook_subset:
        lines.append(f"the fit uses {count(num_points)} features: --codebook_subset {needed:.2g} gives as many")
    if recipe.sampling.precision == "fp32" and machine.gpu and machine.bf16:
        lines.append("sampling in bf16 (--sampling.precision bf16) reads half the bytes")
    if machine.count > 1:
        lines.append(f"every stage is assumed to scale perfectly over {machine.count} processes")
    if machine.gpu:
        training = GPU_SHARES["training"][1]
        lines.append(
            f"shares of the peaks ({training:.2f} of bf16 in training, {GPU_SAMPLING:.2f} of bandwidth in sampling) "
            f"and ${machine.price:.2f} per hour are assumptions, not measurements: expect a factor of two"
        )
    else:
        lines.append(
            "rates are this machine's matrix multiplication rate times shares, some of them assumed: expect a factor "
            "of two"
        )
    if machine.busy:
        lines.append(machine.busy)
    return ["- " + line for line in lines]


def store_use(planner: Planner) -> str:
    """How training reads the token store."""
    if planner.fresh:
        return ", for validation and probes: training encodes fresh crops"
    return (
        ": every training process holds it where that fits into a quarter of its machine's memory, else reads the disk"
    )


def passes(planner: Planner, name: str, epochs: float) -> str:
    """How often a model sees an image and a crop, and what fresh crops add to a step."""
    crops, cfg = planner.recipe.crops_per_image, planner.training_config(name)
    if not planner.fresh:
        each = f", each of its {crops} crops {epochs / crops:.3g} times" if crops > 1 else ", always the same crop"
        return f"sees every image {epochs:.3g} times{each} (digit plan --epochs sets this)"
    step, times = planner.encoding_seconds(name) / cfg.num_steps, planner.training_times(name)
    without, decoding = times["training and encoding"] / cfg.num_steps - step, times["JPEG decoding"] / cfg.num_steps
    return (
        f"sees every image {epochs:.3g} times, each time a new crop (digit plan --epochs sets this): a step takes "
        f"{short(without)}, encoding its crops {short(step)} more, decoding them meanwhile {short(decoding)}"
    )


def short(seconds: float) -> str:
    """Formats the seconds of a step: 23 ms, 1.23 s."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def as_json(planner: Planner) -> dict[str, Any]:
    """Returns the plan as JSON: bytes, seconds, dollars."""
    machine = planner.machine
    stages = [
        {
            "name": s.name, "what": s.what, "memory_bytes": s.memory, "fits": s.memory <= machine.usable,
            "seconds": s.seconds, "gpu_hours": s.seconds * machine.count / 3600,
            "dollars": s.seconds * machine.count / 3600 * machine.price, "bound_by": s.bottleneck,
            "seconds_by_cause": s.times, "advice": list(s.advice),
        }
        for s in planner.stages
    ]  # fmt: skip
    order = asdict(planner.order) | {"reuse": sorted(planner.order.reuse)}
    return {
        "recipe": planner.recipe.name,
        "order": order,
        "machine": asdict(machine),
        "stages": stages,
        "seconds": sum(s.seconds for s in planner.stages),
        "token_store_bytes": planner.store_bytes,
        "notes": notes(planner),
    }


def duration(seconds: float) -> str:
    """Formats seconds in days, hours, minutes or seconds."""
    for least, unit, name in ((3 * 86400, 86400, "d"), (5400, 3600, "h"), (90, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.05 else "<0.1 s"


def amount(number: float) -> str:
    """Formats a number with at least three significant digits: 0.00123, 1.23, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def dollars(price: float) -> str:
    """Formats dollars, whole from $10 on, small ones as "<$0.01"; '-' without a price."""
    if not price:
        return "-"
    if price < 0.01:
        return "<$0.01"
    return f"${price:,.0f}" if price >= 10 else f"${price:.2f}"
