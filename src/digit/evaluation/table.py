"""A result of `digit evaluate` as Markdown for a terminal, and numbers as both table and page show them."""

from typing import Any

WORST_CLASSES = 5  # rows of the table


def to_table(result: dict[str, Any]) -> str:
    """A result of `evaluate` as Markdown for a terminal: metrics, what is left out, and the warnings."""
    protocol, samples, reference = result["protocol"], result["samples"], result["reference"]
    has_statistics = bool(reference.get("statistics"))
    against = f"{reference['num']} images of {reference['name']}" if "name" in reference else ""
    against += f"{' and ' if against and has_statistics else ''}{_saved(reference) if has_statistics else ''}"
    lines = [
        f"protocol {protocol['name']}, network {protocol['network']['network']}; "
        f"{samples['num']} samples of {samples['name']} against {against}",
        *(f"{side['name']}: {side['pixel_range']}" for side in (samples, reference) if "pixel_range" in side),
        "",
        "| metric | value | better | 95% interval or deviation |",
        "|---|---|---|---|",
    ]
    for name, metric in result["metrics"].items():
        better = result["measures"][name]["better"]
        lines.append(f"| {name} | {short(metric['value'])} | {better} | {spread_of(metric)} |")
    lines += [f"| {name} | – | – | left out: {reason} |" for name, reason in result["left_out"].items()]
    lines += _class_lines(result["classes"])
    return "\n".join([*lines, *(f"\nwarning: {text}" for text in result["warnings"])])


def _class_lines(classes: dict[str, dict[str, Any]]) -> list[str]:
    """The classes with the largest distance as Markdown."""
    if not classes:
        return []
    lines = ["", f"classes with the largest distance, of {len(classes)}:", "", "| class | kd | 95% interval |"]
    worst = list(classes.items())[:WORST_CLASSES]
    return [
        *lines,
        "|---|---|---|",
        *(f"| {name} | {short(entry['kd']['value'])} | {spread_of(entry['kd'])} |" for name, entry in worst),
    ]


def _saved(reference: dict[str, Any]) -> str:
    num = reference["statistics"]["num"]
    return f"saved statistics of {'an unknown number of' if num is None else num} images"


def spread_of(entry: dict[str, Any]) -> str:
    """The interval or deviation of a measure, or why there is none."""
    if "missing" in entry:
        return f"– ({entry['missing']})"
    return f"{short(entry['low'])} to {short(entry['high'])}" if "low" in entry else f"± {short(entry['std'])}"


def short(value: float) -> str:
    """About four digits, never in exponent notation."""
    return f"{value:.{2 if abs(value) >= 10 else 4 if abs(value) >= 0.01 else 6}f}"
