"""Writes small images into folders, .zip, .tar and Parquet files."""

import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, name: str = ".png") -> bytes:
    """An encoded image of 8 x 6 pixels, whose red is `number`; JPEG by its name."""
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(out, "JPEG" if name.endswith(".jpg") else "PNG")
    return out.getvalue()


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    """Writes files below `path`."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """Writes `path`.zip."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path.with_suffix(".zip")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Writes `path`.tar."""
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.with_suffix(".tar")


def write_rows(path: Path, columns: dict, metadata: dict | None = None) -> Path:
    """Writes `path`.parquet with a column of images and further columns."""
    num = len(next(iter(columns.values())))
    images = [{"bytes": picture(number), "path": None} for number in range(num)]
    table = pa.table({"image": images} | columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")
