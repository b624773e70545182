"""One measurement: a rate, its spread and its floor; as a row of JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from digit.benchmark.clock import Timing

DIGITS = 6  # significant digits in JSON


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurement of one case of the benchmark."""

    part: str
    """sample, train, encode, kmeans or data."""
    case: str
    """Name of what ran."""
    precision: str
    """fp32, bf16, or - where no arithmetic is involved."""
    unit: str
    """What the rate counts, e.g. tokens."""
    count: float
    """Units per round."""
    time: Timing
    """Seconds of each round."""
    floor: Timing | None = None
    """Seconds of the floor in the same rounds: the work that no implementation can avoid."""
    peak: int | None = None
    """Peak memory in bytes."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Other numbers by name: data_wait and mfu as fractions, whole_over_parts."""

    @property
    def rate(self) -> float:
        """Units per second of the median round."""
        return self.count / self.time.median

    @property
    def spread(self) -> tuple[float, float]:
        """Units per second of the slowest and of the fastest round."""
        return self.count / max(self.time.seconds), self.count / min(self.time.seconds)

    @property
    def floor_rate(self) -> float | None:
        """Units per second at the floor's median time."""
        return None if self.floor is None else self.count / self.floor.median

    @property
    def of_floor(self) -> float | None:
        """Floor's time / time: 1 is as fast as the floor."""
        return None if self.floor is None else self.floor.over(self.time)

    def to_dict(self) -> dict[str, Any]:
        """Returns a row of the JSON results."""
        low, high = self.spread
        row = {"rate": self.rate, "rate_low": low, "rate_high": high, "floor_rate": self.floor_rate}
        row |= {"of_floor": self.of_floor, "seconds": self.time.median, **self.extra}
        named = {"part": self.part, "case": self.case, "precision": self.precision, "unit": f"{self.unit}/s"}
        rounded = {k: None if v is None else float(f"{v:.{DIGITS}g}") for k, v in row.items()}
        return named | rounded | {"peak_bytes": self.peak, "rounds": len(self.time.seconds)}
