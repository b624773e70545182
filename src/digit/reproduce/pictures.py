"""Figures 1, 7 and 8 of the paper: the overview of methods, and pictures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi, radians, sin, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from digit.evaluation import paper
from digit.pipeline.labels import ClassPositions
from digit.planning.work import num_parameters
from digit.reproduce.experiment import Experiment, Outcome, Step
from digit.reproduce.study import Study
from digit.reproduce.tables import (
    METHODS,
    Method,
    best_top1,
    methods_of,
    parts_step,
    probe_step,
    protocol,
    samples_name,
    scores_step,
    training_steps,
)
from digit.reproduce.variants import recipe_of, run_of
from digit.runtime import distributed, plots

COLOURS = {"GAN": "#c58b3c", "diffusion": "#7d6bb0", "masked": "#4f9d69", "masked+AR": "#8fb34a", "AR": "#c0504d"}
OURS, NOT_TOLD = "#1f4e79", "n/a"
ROWS, COLUMNS = 6, 8  # of Figures 7 and 8
NAME_SIZE = 6  # of the letters in Figure 1, points
ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 70, 290, 110, 250)  # of a name, from above, degrees
GAPS = (1, 5, 10, 16, 24, 34, 46, 60)  # between a bubble and its name, points
Box = tuple[float, ...]  # left, bottom, right, top


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method in a panel of Figure 1; None where a value is not told."""

    name: str
    kind: str
    parameters: float
    x: float | None
    y: float | None
    ours: bool = False


# -------------------------------------------------------------------- Figure 1


def fig1(study: Study) -> Experiment:
    """Probe against unconditional distance, score against class-conditional distance: the paper's points and ours."""
    study.require_labels("Figure 1")
    seed = study.scale.seeds[0]
    methods = {label: method for label, method in methods_of(study).items() if method.prior}
    steps = [parts_step(study)]
    for conditional in (False, True):
        steps += training_steps(study, methods.values(), seed, conditional)
        steps += [scores_step(study, method, seed, conditional) for method in methods.values()]
    probes = {method.variant: probe_step(study, "prior", seed, method.variant) for method in methods.values()}
    steps += [*probes.values(), sizes_step(study, methods, seed)]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        distance, score = study.network.metric("fd"), study.network.metric("is")
        left, right = cited_points()
        for label, method in methods.items():
            plain, classes = (results[samples_name(study, method, seed, c)] for c in (False, True))
            about: dict[str, Any] = dict(name=label, kind="ours", parameters=results["sizes"][label], ours=True)
            left.append(Point(x=best_top1(results[probes[method.variant].name]), y=plain[distance], **about))
            right.append(Point(x=classes[distance], y=classes[score], **about))
        picture = out / "fig1.png"
        draw_overview(picture, left, right, together=study.inception is not None)
        points = {"a": [asdict(point) for point in left], "b": [asdict(point) for point in right]}
        return Outcome(table=overview_table(study, left, right), metrics=points, pictures=[picture])

    return Experiment(title="Figure 1: probe and generation of all methods; one seed", steps=steps, summarise=summarise)


def sizes_step(study: Study, methods: dict[str, Method], seed: int) -> Step:
    """Step: millions of parameters of each method's prior, which is what the paper's tables count."""

    def make() -> dict[str, float]:
        priors = {name: run_of(study, method.variant, seed, False) for name, method in methods.items()}
        return {name: num_parameters(run.sequence_config("prior")) / 1e6 for name, run in priors.items()}

    return Step(name="sizes", seconds=1.0, make=make)


def cited_points() -> tuple[list[Point], list[Point]]:
    """The paper's points: (a) probe and unconditional FID, (b) class-conditional FID and IS; values of its tables."""
    top1 = {(row.method, row.parameters): row.top1 for row in paper.TABLE2_ROWS}
    left = [
        Point(name=row.method, kind=row.kind, parameters=in_millions(row.parameters), x=probe_of(row, top1), y=row.fid)
        for row in paper.TABLE3_ROWS
        if row.kind != "data"
    ]
    known = {(row.method, row.parameters) for row in paper.TABLE3_ROWS}
    left += [
        Point(name=row.method, kind="AR", parameters=in_millions(row.parameters), x=row.top1, y=None)
        for row in paper.TABLE2_ROWS
        if row.ours == "" and (row.method, row.parameters) not in known
    ]
    right = [
        Point(
            name=row.method, kind=row.kind, parameters=in_millions(row.parameters), x=row.fid, y=row.inception
        )
        for row in paper.TABLE4_ROWS
        if row.kind != "data" and not row.guided and row.inception is not None
    ]  # fmt: skip
    return left, right


def probe_of(row: paper.Generation, top1: dict[tuple[str, str], float]) -> float | None:
    """Top-1 of a row of Table 3, where Table 2 has the model; DiGIT's renderers share its prior."""
    return top1.get((row.method.partition(" (")[0], row.parameters))


def in_millions(text: str) -> float:
    """ "1.67B" as 1670.0."""
    return float(text[:-1]) * {"M": 1.0, "B": 1000.0}[text[-1]]


def draw_overview(path: Path, left: Sequence[Point], right: Sequence[Point], *, together: bool) -> None:
    """Both panels as bubbles; ours in rows of their own where another judge measured them on other data."""
    groups = [(left, right)] if together else [
        ([p for p in left if p.ours is ours], [p for p in right if p.ours is ours]) for ours in (False, True)
    ]  # fmt: skip
    with plots.panels(path, 2, len(groups), size=(6.5, 4.6)) as axes:
        overview(axes, groups)


def overview(axes: Any, groups: Sequence[tuple[Sequence[Point], Sequence[Point]]]) -> None:
    """Draw (points of panel a, points of panel b) into rows of axes, one legend below them."""
    placed = []
    for row, (first, second) in zip(axes, groups, strict=True):
        placed += [(row[0], bubbles(row[0], first)), (row[1], bubbles(row[1], second))]
        row[0].set(xlabel="linear probe, top-1 (%)", ylabel="distance, unconditional", title="(a)")
        row[1].set(xlabel="distance, class-conditional", ylabel="inception score", title="(b)")
        row[0].invert_yaxis()
        row[1].invert_xaxis()
    figure = axes[0, 0].figure
    kinds = dict.fromkeys(point.kind for group in groups for points in group for point in points)
    handles = [axes[0, 0].scatter([], [], color=COLOURS.get(kind, OURS), label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.draw_without_rendering()  # lays the panels out, which the places of the names depend on
    for plot, discs in placed:
        write_names(plot, discs)


class Disc(NamedTuple):
    """A bubble and its name."""

    name: str
    x: float
    y: float
    area: float
    """In square points."""


def bubbles(plot: Any, points: Sequence[Point]) -> list[Disc]:
    """Points, area by parameters; a value that is not told stands beyond the worse end of its axis. Returns them."""
    largest = max((point.parameters for point in points), default=1.0)
    place_x, place_y = (beyond(points, axis, worse) for axis, worse in (("x", min), ("y", max)))
    discs = []
    for point in points:
        x, y = place_x if point.x is None else point.x, place_y if point.y is None else point.y
        colour = OURS if point.ours else COLOURS.get(point.kind, "#888")
        discs.append(Disc(point.name, x, y, 20 + 400 * (point.parameters / largest) ** 0.5))
        plot.scatter([x], [y], s=discs[-1].area, color=colour, alpha=0.55, edgecolors="#333", linewidths=0.6)
    if any(point.x is None for point in points):
        plot.annotate(NOT_TOLD, (place_x, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    if any(point.y is None for point in points):
        plot.annotate(NOT_TOLD, (1.0, place_y), xycoords=("axes fraction", "data"), ha="left", va="center")
    plot.grid(alpha=0.3)
    plot.margins(0.12)
    return discs


def write_names(plot: Any, discs: Sequence[Disc]) -> None:
    """Write each name at the nearest place where it covers no other name and no bubble; far ones with a line."""
    points_per_pixel = 72 / plot.figure.dpi
    bounds = tuple(np.array(plot.get_window_extent().extents) * points_per_pixel)
    centres = plot.transData.transform([(disc.x, disc.y) for disc in discs]).reshape(-1, 2) * points_per_pixel
    radii = [sqrt(disc.area / pi) for disc in discs]
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    for disc, centre, radius in sorted(zip(discs, centres, radii, strict=True), key=lambda entry: entry[2]):
        size = name_size(plot, disc.name) * points_per_pixel
        boxes = [(box, gap) for gap in GAPS for box in boxes_around(centre, radius + gap, size)]
        box, gap = min(boxes, key=lambda entry: covered(entry[0], taken, bounds))  # the first, nearest of equal ones
        taken.append(box)
        shift = np.array([box[0] + box[2], box[1] + box[3]]) / 2 - centre
        line = dict(arrowstyle="-", linewidth=0.4, color="#555", shrinkA=0, shrinkB=0) if gap > GAPS[0] else None
        style: dict[str, Any] = dict(fontsize=NAME_SIZE, ha="center", va="center", arrowprops=line)
        text = plot.annotate(disc.name, (disc.x, disc.y), xytext=shift, textcoords="offset points", **style)
        text.set_in_layout(False)


def name_size(plot: Any, name: str) -> np.ndarray:
    """(width, height) of a name in pixels, with some room around it."""
    text = plot.text(0, 0, name, fontsize=NAME_SIZE)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width + 4, extent.height + 1])


def boxes_around(centre: np.ndarray, distance: float, size: np.ndarray) -> Iterator[Box]:
    """Boxes of a size at a distance from a centre: above, below, beside, then between."""
    for angle in ANGLES:
        direction = np.array([sin(radians(angle)), cos(radians(angle))])
        middle = centre + direction * (distance + size / 2)
        yield (*(middle - size / 2), *(middle + size / 2))


def covered(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    """Area of a box that lies on taken boxes or beyond the bounds."""
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return sum(overlap(box, other) for other in taken) + whole - overlap(box, bounds)


def overlap(first: Box, second: Box) -> float:
    """Area that two boxes share."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


def beyond(points: Sequence[Point], axis: str, worse: Callable[[list[float]], float]) -> float:
    """A place on an axis a little beyond its worse end, for values that are not told."""
    told = [value for point in points if (value := getattr(point, axis)) is not None] or [0.0, 1.0]
    end = worse(told)
    return end + 0.12 * (end - sum(told) / len(told)) * 2


def overview_table(study: Study, left: Iterable[Point], right: Iterable[Point]) -> str:
    """Markdown: every point of both panels."""
    lines = ["| panel | method | M parameters | x | y | source |", "|---|---|---|---|---|---|"]
    for panel, points in (("a", left), ("b", right)):
        for point in points:
            x, y = (NOT_TOLD if value is None else f"{value:.4g}" for value in (point.x, point.y))
            source = "measured here" if point.ours else "paper"
            lines.append(f"| {panel} | {point.name} | {point.parameters:.4g} | {x} | {y} | {source} |")
    lines += [
        "",
        f"(a) x: top-1 of a linear probe, y: distance of unconditional samples; (b) x: distance of class-conditional "
        f"samples, y: inception score; area by parameters. {protocol(study)} The paper's points are those of its "
        "Tables 2 to 4; its Figure 1a also shows self-supervised models, whose values stand in no table of it.",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------- Figures 7 and 8


def fig7(study: Study) -> Experiment:
    """A grid of class-unconditional samples."""
    return picture(study, "fig7", "Figure 7: class-unconditional samples", False)


def fig8(study: Study) -> Experiment:
    """Class-conditional samples, one class in each row."""
    study.require_labels("Figure 8")
    return picture(study, "fig8", "Figure 8: class-conditional samples, one class a row", True)


def picture(study: Study, name: str, title: str, conditional: bool) -> Experiment:
    """A grid of samples of the largest model of the scale, with the settings that made it."""
    seed, known = study.scale.seeds[0], methods_of(study)
    method = METHODS["DiGIT + AR, large" if "DiGIT + AR, large" in known else "DiGIT + AR"]
    path = study.out / "pictures" / f"{name}.png"
    steps = [parts_step(study), *training_steps(study, [method], seed, conditional)]
    seconds = study.costs.sampling(ROWS * COLUMNS, method.models, recipe_of(study, method.variant))
    steps.append(Step(name=name, seconds=seconds, make=lambda: draw_samples(study, method, seed, conditional, path)))

    def summarise(results: dict[str, Any], _: Path) -> Outcome:
        lines = ["| setting | value |", "|---|---|"]
        lines += [f"| {setting} | {value} |" for setting, value in results[name].items()]
        lines += ["", "The paper does not say how its pictures were chosen; these are the first of the seed."]
        return Outcome(table="\n".join(lines), metrics=results[name], pictures=[path])

    return Experiment(title=title, steps=steps, summarise=summarise)


def draw_samples(study: Study, method: Method, seed: int, conditional: bool, path: Path) -> dict[str, Any]:
    """Sample ROWS x COLUMNS images and save them as a grid; returns the settings."""
    run = run_of(study, method.variant, seed, conditional)
    pipe, rows = study.sampler(run, method.prior, method.renderer), chosen_classes(run.num_classes)
    labels = ClassPositions([label for label in rows for _ in range(COLUMNS)]) if rows else None
    images = pipe.generate((len(rows) or ROWS) * COLUMNS, labels, seed=seed)
    names = [study.train.classes[label] for label in rows]
    distributed.on_main(lambda: save(path, images, names))
    sampling = pipe.sampling
    return {
        "model": method.variant, "seed of the first image": seed, "images": len(images), "classes": ", ".join(names),
        "prior": f"top-k {sampling.prior.top_k}, top-p {sampling.prior.top_p:g}, T {sampling.prior.temperature:g}",
        "renderer": f"top-k {sampling.renderer.top_k}, top-p {sampling.renderer.top_p:g}, T "
        f"{sampling.renderer.temperature:g}",
        "guidance": sampling.prior.cfg_scale, "precision": sampling.precision,
    }  # fmt: skip


def chosen_classes(num_classes: int) -> list[int]:
    """At most ROWS classes, spread evenly; none of an unconditional model."""
    count = min(ROWS, num_classes)
    return [row * num_classes // count for row in range(count)]


def save(path: Path, images: Tensor, names: Sequence[str]) -> None:
    """Write the grid, with the classes beside its rows."""
    scale = max(1, 64 // images.shape[-1])
    plots.save_png(path, plots.grid(images, COLUMNS, scale=scale, row_names=names))
