"""Count the rooms (children of the package `digit`) and the arrows of import between them; fail above the limits.

New code belongs in the room that it serves. If a limit must rise, raise it here and say why in docs/architecture.md.
"""

import itertools
import sys

import grimp

MAX_ROOMS, MAX_ARROWS = 20, 115


def main() -> int:
    graph = grimp.build_graph("digit")
    rooms = sorted(graph.find_children("digit"))
    arrows = {
        (a, b)
        for a, b in itertools.permutations(rooms, 2)
        if graph.direct_import_exists(importer=a, imported=b, as_packages=True)
    }
    print(f"{len(rooms)} rooms (limit {MAX_ROOMS}), {len(arrows)} arrows of import (limit {MAX_ARROWS})")
    return int(len(rooms) > MAX_ROOMS or len(arrows) > MAX_ARROWS)


if __name__ == "__main__":
    sys.exit(main())
