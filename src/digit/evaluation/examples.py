"""Which images show what the measures say: nearest reference images, best and worst by density, what samples lack.

Each example is {"sample": row, "reference": row, "ratio", "density"}, rows in order of the sets.
"""

import math
from typing import Any

import numpy as np

from digit.metrics.neighbours import Neighbours
from digit.runtime.spread import spread

NUM_PAIRS, NUM_SINGLE = 12, 24
Examples = dict[str, list[dict[str, Any]]]


def choose_examples(num_samples: int, found: Neighbours | None) -> Examples:
    """Rows to show, by what they show; without neighbours there are samples alone.

    - spread: samples evenly spread over the set, with the nearest reference image of each
    - closest: samples with the smallest ratio, distance to the nearest reference image over that one's distance to its
      own nearest other; of copies it is near 0, of new images about 1
    - densest, sparsest: samples in the most and in the fewest neighbourhoods of reference images; of equal ones the
      nearest and the farthest
    - missed: reference images, evenly spread over those whose neighbourhood holds no sample
    """
    if found is None:
        return {"spread": [{"sample": row} for row in spread(num_samples, NUM_SINGLE)]}
    ratio = np.array([_ratio(*squares) for squares in zip(found.nearest_squares, found.own_squares, strict=True)])
    by_density = np.lexsort((ratio, -found.num_balls))  # the densest first
    missed = np.flatnonzero(~found.covered)

    def entries(rows: Any) -> list[dict[str, Any]]:
        return [
            {
                "sample": int(row),
                "reference": int(found.nearest[row]),
                "ratio": float(ratio[row]) if math.isfinite(ratio[row]) else None,
                "density": float(found.densities[row]),
            }
            for row in rows
        ]

    return {
        "spread": entries(spread(num_samples, NUM_PAIRS)),
        "closest": entries(np.argsort(ratio, kind="stable")[:NUM_PAIRS]),
        "densest": entries(by_density[: min(NUM_SINGLE, num_samples // 2)]),
        "sparsest": entries(by_density[::-1][: min(NUM_SINGLE, num_samples // 2)]),
        "missed": [{"reference": int(missed[place])} for place in spread(len(missed), NUM_SINGLE)],
    }


def _ratio(nearest: float, own: float) -> float:
    """sqrt(nearest / own) of squared distances; 0 for a copy, infinity where the reference image is repeated."""
    if nearest == 0:
        return 0.0
    return math.sqrt(nearest / own) if own > 0 else math.inf
