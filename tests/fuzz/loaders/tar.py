"""WebDataset shards: damaged headers with right checksums, odd members, names that lead out of the folder."""

import io
import random
import tarfile
from functools import cache
from pathlib import Path

from digit.data.images import open_source

from ..mutate import EDGES, damage, json_bytes, strange_json
from .images import read_all, samples

NAMES = (
    "../../0001.jpg",
    "/etc/passwd",
    "/abs/0001.jpg",
    "a/../../0001.png",
    "./0001.png",
    "0001",
    ".png",
    "0001.",
    "a\nb.png",
    "x" * 300 + ".png",
    "\udcff\udcfe.png",
    "0001.PNG",
    "0001.tar.png",
    "0001.seg.png",
    "0001/0001.png",
    "",
    "..",
    "0001.png/",
    "\x1b[2J.png",
)
TYPES = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    b"V",
    b"\0",
    b"Z",
)
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "sparse": (386, 97),
    "prefix": (345, 155),
}
BLOCK = 512
PAX = (
    b"size",
    b"path",
    b"linkpath",
    b"GNU.sparse.major",
    b"GNU.sparse.minor",
    b"GNU.sparse.map",
    b"GNU.sparse.size",
    b"GNU.sparse.realsize",
    b"GNU.sparse.name",
    b"mtime",
    b"hdrcharset",
)


class TarLoader:
    """Opens a shard or a folder of shards with open_source, and reads every image."""

    name = "tar"

    def build(self, folder: Path, rng: random.Random) -> None:
        for shard in range(rng.choice((1, 1, 1, 2))):
            data = odd_tar(rng) if rng.random() < 0.5 else rng.choice(seeds())
            action = rng.random()
            if action < 0.35:
                data = damage(data, rng, seeds(), slice(0, rng.choice((BLOCK, len(data)))))
            elif action < 0.8:
                data = changed_fields(data, rng)
            (folder / f"{shard:04d}{rng.choice(('.tar',) * 9 + ('.tar.gz',))}").write_bytes(data)

    def load(self, folder: Path) -> None:
        read_all(open_source(folder))


@cache
def seeds() -> tuple[bytes, ...]:
    """Undamaged shards in every tar format."""
    members = [
        (f"{n:04d}.{kind}", data)
        for n in range(4)
        for kind, data in (("png", samples()["PNG"][0]), ("cls", b"%d" % (n % 2)), ("json", b'{"label": "a"}'))
    ]
    return tuple(
        _pack([(tarfile.TarInfo(name), data) for name, data in members], form)
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    )


def _pack(members: list[tuple[tarfile.TarInfo, bytes]], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def odd_tar(rng: random.Random) -> bytes:
    """A well-formed archive of odd members."""
    members = []
    for n in range(rng.randrange(7)):
        kind = rng.choice(("png", "png", "jpg", "cls", "json", "txt", "seg.png"))
        info = tarfile.TarInfo(rng.choice(NAMES) if rng.random() < 0.3 else f"{rng.choice((0, 1, n)):04d}.{kind}")
        info.type = rng.choice(TYPES) if rng.random() < 0.25 else tarfile.REGTYPE
        info.linkname = rng.choice(("../../etc/passwd", "/etc/passwd", "0000.png", info.name, ""))
        info.mtime = rng.choice((0, 1, 2**33))
        if rng.random() < 0.2:
            info.pax_headers = {rng.choice(PAX).decode(): rng.choice(("-5", "0", "x", "1e9", "9" * 30, "1.0", "a\nb"))}
        members.append((info, _content(kind, rng)))
    try:
        return _pack(members, rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    except (ValueError, tarfile.TarError):
        return rng.choice(seeds())  # not every mixture can be written


def _content(kind: str, rng: random.Random) -> bytes:
    if kind == "cls":
        odd = (b"", b"-1", b"x\ny", b"\xff\xfe", b"1" * 5000, b"9" * 30, "²".encode(), "٣".encode(), b"-", b"0" * 2**21)
        return rng.choice((b"0", b"1", b" 2\n", *odd))
    if kind == "json":
        return json_bytes(strange_json({"label": 1, "cls": "a", "class": [1]}, rng), rng)
    return rng.choice((samples()["PNG"][0], samples()["JPEG"][0], b"", damage(samples()["PNG"][0], rng)))


def changed_fields(data: bytes, rng: random.Random) -> bytes:
    """Changes one to three header fields and corrects the checksum."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - BLOCK + 1, BLOCK) if out[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not headers:
            break
        at = rng.choice(headers)
        field = rng.choice(sorted(FIELDS))
        begin, length = FIELDS[field]
        out[at + begin : at + begin + length] = _field(field, length, rng)
        if field != "checksum" or rng.random() < 0.5:
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)


def _field(field: str, length: int, rng: random.Random) -> bytes:
    if field == "type":
        return rng.choice(TYPES)
    if field in ("size", "mtime", "sparse") and rng.random() < 0.8:
        value = rng.choice((*EDGES, -512, -1024, -2048, 513, 2**40))
        octal = b"%011o\0" % abs(value)
        binary = (0x80 << 88 | value).to_bytes(12, "big") if value >= 0 else (2**96 + value).to_bytes(12, "big")
        return (rng.choice((octal[-12:], binary)) * 9)[:length]
    if field in ("name", "link", "prefix"):
        return rng.choice(NAMES).encode("utf-8", "surrogateescape")[:length].ljust(length, b"\0")
    return rng.randbytes(length)
