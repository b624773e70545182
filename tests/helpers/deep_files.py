"""Image files of 16 bits and other types that Pillow cannot write, as bytes."""

import struct
import zlib

import numpy as np

TIFF_TYPES = {2: "s", 3: "H", 4: "I", 11: "f"}  # the ones used here, with their names in struct
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_16(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG of (H, W) or (H, W, 2 | 3 | 4), rows filtered by Sub; `chunks` stand before the pixels."""
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    rows = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, -1)
    left = np.pad(rows, ((0, 0), (2 * channels, 0)))[:, : rows.shape[1]]
    filtered = np.insert(rows - left, 0, 1, axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOURS[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def tiff(
    values: np.ndarray,
    photometric: int = 1,
    *,
    order: str = "<",
    planes: bool = False,
    deflate: bool = False,
    tags: dict[int, tuple[int, tuple | bytes]] | None = None,
) -> bytes:
    """A TIFF of one strip, or one for each channel, of any dtype; `tags` are {number: (type, values)}."""
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    raw = values.astype(values.dtype.newbyteorder(order))
    strips = [raw[..., c].tobytes() for c in range(channels)] if planes else [raw.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    offsets = tuple(np.cumsum([8, *(len(strip) for strip in strips[:-1])]).tolist())
    entries = {
        256: (4, (width,)), 257: (4, (height,)), 258: (3, (8 * values.dtype.itemsize,) * channels),
        259: (3, (8 if deflate else 1,)), 262: (3, (photometric,)), 273: (4, offsets), 277: (3, (channels,)),
        278: (4, (height,)), 279: (4, tuple(len(strip) for strip in strips)), 284: (3, (1 + planes,)),
        339: (3, ("uif".index(values.dtype.kind) + 1,) * channels), **(tags or {}),
    }  # fmt: skip
    data = b"".join(strips)
    data += bytes(len(data) % 2)
    directory, extra, start = struct.pack(order + "H", len(entries)), b"", 8 + len(data) + 6 + 12 * len(entries)
    for number, (kind, content) in sorted(entries.items()):
        name = order + f"{len(content)}{TIFF_TYPES[kind]}"
        packed = content if isinstance(content, bytes) else struct.pack(name, *content)
        if len(packed) > 4:
            place, extra = struct.pack(order + "I", start + len(extra)), extra + packed + bytes(len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", number, kind, len(content)) + place
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return head + data + directory + bytes(4) + extra
