"""MkDocs hook: one page of API reference per room (folder) of src/digit, listing its modules, from their docstrings."""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "src" / "digit"
# in the order of an image's journey; a room that is missing here comes last
ORDER = (
    "pipeline", "tokenizers", "models", "sampling", "training", "data", "runs", "released", "convert",
    "metrics", "evaluation", "reproduce", "planning", "benchmark", "cli", "runtime",
)  # fmt: skip


def rooms() -> list[str]:
    """Names of the folders of the package that hold Python modules, in the order of the reference."""
    names = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules that have a docstring, private ones left out."""
    files = sorted((PACKAGE / room).rglob("*.py"))
    files = [f for f in files if not f.stem.startswith("_") and ast.get_docstring(ast.parse(f.read_text("utf-8")))]
    return [".".join(("digit", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]


def page(room: str) -> str:
    """Markdown of a room's page: what the room is, then each module by a mkdocstrings directive."""
    about = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))) or ""
    parts = [f"# digit.{room}", about, *(f"::: {name}" for name in modules(room))]
    return "\n\n".join(part for part in parts if part) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav.append({"API reference": [{f"digit.{room}": f"api/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=page(room)))
    return files
