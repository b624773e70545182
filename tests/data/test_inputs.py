"""docs/inputs.md is true: every example of its tables is built and read, and gives what the table says."""

import json
import re
from pathlib import Path

import pytest
from written_images import picture, write_folder, write_rows, write_tar, write_zip

from digit.data.decode import EXTENSIONS
from digit.data.images import open_source
from digit.data.labels import LABEL_NAMES
from digit.errors import DigitError

PAGE = (Path(__file__).parents[2] / "docs/inputs.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table, f"no table below {heading}"
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def members(cell: str) -> dict[str, bytes]:
    """'a/1.png 1.cls=cat' -> the files and their contents."""
    found = {}
    for number, part in enumerate(re.sub("^`|`$", "", cell).split(" ")):
        name, _, content = part.partition("=")
        is_image = Path(name).suffix in EXTENSIONS
        found[name] = picture(number, name) if is_image else content.replace("\\n", "\n").encode()
    return found


WRITERS = {"Folders": write_folder, "Label files": write_folder, "A .zip": write_zip, "WebDataset .tar": write_tar}
EXAMPLES = [(heading, *row) for heading in WRITERS for row in rows(heading)]


@pytest.mark.parametrize(("heading", "files", "num", "classes", "note"), EXAMPLES)
def test_examples_of_files(tmp_path, heading, files, num, classes, note):
    path = WRITERS[heading](tmp_path / "data", members(files))
    if num == "refused":
        with pytest.raises(DigitError, match=re.escape(note)):
            open_source(path)
        return
    source = open_source(path)
    assert (len(source), source.classes) == (int(num), re.findall("`(.+?)`", classes))
    assert any(note in said for said in source.notes) if note else not source.notes
    for index in range(len(source)):
        assert source.read(index)[0].size == (8, 6)


@pytest.mark.parametrize(("columns", "classes", "unlabelled", "note"), rows("Parquet"))
def test_examples_of_columns(tmp_path, columns, classes, unlabelled, note):
    values = json.loads(columns.strip("`"))
    source = open_source(write_rows(tmp_path / "x", values))
    assert source.classes == re.findall("`(.+?)`", classes)
    assert (source.labels() < 0).sum() == int(unlabelled)
    assert any(note in said for said in source.notes)


def test_names_of_label_columns():
    section = PAGE.split("\n## Parquet\n")[1].split("(in any case)")[0]
    listed = re.findall("`(.+?)`", section)
    assert tuple(listed) == LABEL_NAMES
