"""Random damage to bytes and to JSON values; all randomness comes from a random.Random."""

import copy
import json
import random
import struct
from typing import Any

EDGES = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
FORMATS = ("<b", "<h", ">h", "<i", ">i", "<q", ">q", "<f", "<d")
NAMES = ("../up", "/etc/passwd", "a\nb", "\x00", "\ud800", "é" * 300, "x" * 5000, ".", "..", "a/b", "~", "con\t", "")
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, 1 << 4000,
    "", "x", "nan", "5", *NAMES, [], [[]], [0], [1, 2, 3], [-1, 4], {}, {"a": 1}, {"a": {"b": [None]}},
)  # fmt: skip


def damage(data: bytes, rng: random.Random, others: tuple[bytes, ...] = (), where: slice = slice(None)) -> bytes:
    """Makes one to eight changes to `data`, mostly within `where`; `others` are bytes to splice in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            return bytes(rng.randbytes(rng.randrange(64)))
        start, stop, _ = where.indices(len(out)) if rng.random() < 0.8 else (0, len(out), 1)
        place = rng.randrange(start, stop) if start < stop else rng.randrange(len(out))
        rng.choice((_flip, _set, _number, _cut, _insert, _remove, _repeat, _splice))(out, place, rng, others)
    return bytes(out)


def _flip(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    out[place] ^= 1 << rng.randrange(8)


def _set(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    out[place] = rng.choice((0, 255, 127, 128, rng.randrange(256)))


def _number(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    written = number(rng)
    out[place : place + len(written)] = written


def _cut(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    del out[place:]


def _insert(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    out[place:place] = rng.choice((rng.randbytes(rng.randrange(1, 40)), bytes(rng.randrange(1, 600)), number(rng)))


def _remove(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    del out[place : place + rng.choice((1, 2, 4, 8, 100))]


def _repeat(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    out[place:place] = out[place : place + rng.randrange(1, 600)] * rng.choice((1, 1, 2, 20))


def _splice(out: bytearray, place: int, rng: random.Random, others: tuple[bytes, ...]) -> None:
    other = rng.choice(others) if others else bytes(out)
    begin = rng.randrange(len(other) + 1)
    piece = other[begin : begin + rng.randrange(1, 200)]
    out[place : place + len(piece)] = piece


def number(rng: random.Random) -> bytes:
    """Bytes of a number at the limits of its type."""
    form = rng.choice(FORMATS)
    if form in ("<f", "<d"):
        return struct.pack(form, rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30)))
    bits = 8 * struct.calcsize(form)
    value = rng.choice(EDGES) & (2**bits - 1)
    return value.to_bytes(bits // 8, "little" if form[0] == "<" else "big")


def strange_json(value: Any, rng: random.Random) -> Any:
    """Copies a JSON value with one to three entries changed, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(STRANGE)
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.12:
            del holder[key]
        elif action < 0.2:
            other = rng.choice((*NAMES, "format", "name", "vocab_size", "x"))
            if isinstance(holder, dict):
                holder[other] = copy.deepcopy(holder[key])
            else:
                holder.append(copy.deepcopy(holder[key]))
        elif action < 0.32:
            holder[key] = _near(holder[key], rng)
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value if rng.random() > 0.03 else rng.choice(STRANGE)


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, value * 10**9, rng.choice(EDGES)))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e9, 0.0, 1.5))
    if isinstance(value, str):
        return value + rng.choice(("x", "\n", "\x00", ""))
    return [value]


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """JSON text, sometimes with extreme nesting, numbers of 5,000 digits or repeated keys."""
    text = json.dumps(value)
    action = rng.random()
    if action < 0.02:
        depth = rng.choice((500, 5000, 100_000))
        text = "[" * depth + "]" * rng.choice((0, depth))
    elif action < 0.04:
        text = text.replace(": 1", ": 1" + "0" * 5000, 1)
    elif action < 0.06 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    return text.encode()
