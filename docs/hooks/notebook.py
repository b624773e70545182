"""MkDocs hook: docs/*.ipynb become pages, as committed: cells, printed text and pictures. Runs no code."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace every notebook by a generated Markdown page, and add its pictures."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
        stem = file.src_uri.removesuffix(".ipynb")
        page, pictures = to_markdown(notebook, f"pictures/{Path(stem).name}")
        files.remove(file)
        files.append(File.generated(config, f"{stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    return files


def with_pages(nav: Any) -> Any:
    """A nav with the generated pages in place of the notebooks."""
    if isinstance(nav, dict):
        return {title: with_pages(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [with_pages(entry) for entry in nav]
    return nav.removesuffix(".ipynb") + ".md" if isinstance(nav, str) and nav.endswith(".ipynb") else nav


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = with_pages(config.nav)
    return config


def to_markdown(notebook: dict[str, Any], picture_stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook of format 4 -> (Markdown, PNG bytes by path); pictures are named PICTURE_STEM_NUMBER.png."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{picture_stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(joined(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
            elif text := joined(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures


def joined(text: str | list[str]) -> str:
    """A notebook's text, which is one string or a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a notebook lead to its page."""
    return re.sub(r"\]\(([\w/-]+)\.ipynb\)", r"](\1.md)", markdown)
