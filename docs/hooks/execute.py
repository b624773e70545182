"""Run a notebook's code cells and keep what they print and plot: `python docs/hooks/execute.py NOTEBOOK`.

The cells need no Jupyter kernel: they are plain Python, `print` writes text, `plt.show()` ends a figure.
"""

import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run every code cell in order; outputs go into the cells. Returns the names that the cells defined."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        outputs: list[dict[str, Any]] = []
        start = time.perf_counter(), time.process_time()
        text = io.StringIO()

        def show(outputs: list[dict[str, Any]] = outputs, text: io.StringIO = text) -> None:
            keep_text(outputs, text)
            outputs.append(picture(plt.gcf()))
            plt.close("all")

        plt.show = show
        with contextlib.redirect_stdout(text):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
        keep_text(outputs, text)
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        print(f"cell {count} of {len(cells)}: {seconds:.1f} s, {cpu:.1f} s of CPU time", file=sys.stderr)
        cell["outputs"], cell["execution_count"] = outputs, count
    return names


def keep_text(outputs: list[dict[str, Any]], text: io.StringIO) -> None:
    """Move what was printed since the last call into the outputs."""
    if text.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.getvalue().splitlines(keepends=True)})
        text.seek(0)
        text.truncate()


def picture(figure: Any) -> dict[str, Any]:
    """A matplotlib figure as a notebook's output."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=75, format="png", bbox_inches="tight")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    execute(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
