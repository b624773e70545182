"""Counts the package's rooms, the arrows between them and the circles, from the imports: `python .ci/rooms.py [ROOT]`.

A room is a folder of src/digit, a file at its root, or bench/. An arrow leads from one room to another that any of its
files imports, also inside a function or for type checking alone. A circle is a set of files that import each other (a
strongly connected component of the import graph). `--limits ROOMS ARROWS CIRCLES` fails where one is exceeded.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def source_files(root: Path) -> dict[str, Path]:
    """Dotted module name to file, of src/digit and bench."""
    files = {}
    for path in sorted(root.glob("src/digit/**/*.py")):
        parts = path.relative_to(root / "src").with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files | {f"bench.{path.stem}": path for path in sorted(root.glob("bench/*.py"))}


def room_of(module: str, files: dict[str, Path]) -> str:
    """The room that a module is in."""
    top, *rest = module.split(".")
    if top != "digit":
        return top
    is_folder = files[module].parent.name != "digit" or len(rest) > 1
    return rest[0] if is_folder else f"{rest[0] if rest else '__init__'}.py"


def imports(path: Path, files: dict[str, Path]) -> Iterator[str]:
    """The modules of `files` that this one imports; of a package also the named sub-modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name in files]
            yield from inner
            if len(inner) < len(names) and node.module in files:
                yield node.module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of two files or more (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(stack[at:])
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return [sorted(component) for component in found if len(component) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="root of the repository")
    parser.add_argument("--limits", nargs=3, type=int, metavar=("ROOMS", "ARROWS", "CIRCLES"))
    parser.add_argument("--list", action="store_true", help="print every room and what it imports")
    args = parser.parse_args()

    files = source_files(args.root)
    graph = {module: {other for other in imports(path, files) if other != module} for module, path in files.items()}
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        room = room_of(module, files)
        rooms.setdefault(room, set()).update(r for other in others if (r := room_of(other, files)) != room)
    found = circles(graph)
    counts = (len(rooms), sum(map(len, rooms.values())), len(found))
    if args.list:
        for room, others in sorted(rooms.items()):
            print(f"{room:<14} -> {', '.join(sorted(others)) or '-'}")
    for circle in found:
        print(f"circle: {', '.join(circle)}")
    print("rooms {}, arrows {}, circles {}".format(*counts))
    if args.limits and any(count > limit for count, limit in zip(counts, args.limits, strict=True)):
        print("more than the limits {}, {}, {}: see docs/architecture.md".format(*args.limits), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
