"""Whatever the encoding and state of standard output and error, a print is readable or dropped, and never raises."""

import io
import os
import subprocess
import sys

import pytest

from digit.runtime.output import Output, kept_open, occupy_descriptors

TEXT = "fd 3.2 ± 0.1, 1–2 — a×b … √2 кот 😀 \udcff"


class Broken(io.StringIO):
    """A stream on which every write fails."""

    def __init__(self, error: Exception):
        super().__init__()
        self.failure = error

    def write(self, text):
        raise self.failure

    def flush(self):
        raise self.failure


def written(text: str, encoding: str) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    out = Output(stream)
    assert out.write(text) == len(text)
    out.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", "fd 3.2 +- 0.1, 1-2 - axb ... \\u221a2 \\u043a\\u043e\\u0442 \\U0001f600 \\udcff"),
        ("latin-1", "fd 3.2 ± 0.1, 1-2 - a×b ... \\u221a2 \\u043a\\u043e\\u0442 \\U0001f600 \\udcff"),
        ("cp437", "fd 3.2 ± 0.1, 1-2 - axb ... √2 \\u043a\\u043e\\u0442 \\U0001f600 \\udcff"),
        ("cp1252", "fd 3.2 ± 0.1, 1–2 — a×b … \\u221a2 \\u043a\\u043e\\u0442 \\U0001f600 \\udcff"),
        ("koi8-r", "fd 3.2 +- 0.1, 1-2 - axb ... √2 кот \\U0001f600 \\udcff"),
        ("utf-8", TEXT.replace("\udcff", "\\udcff")),
        ("utf-16", TEXT.replace("\udcff", "\\udcff")),
    ],
)
def test_what_an_encoding_lacks_is_written_in_ascii(encoding, shown):
    assert written(TEXT, encoding) == shown


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), OSError(5, "EIO"), ValueError("closed file")]
)
def test_a_stream_that_fails_is_given_up_and_keeps_its_first_error(error):
    out = Output(Broken(error))
    assert out.write("a") == 1
    out.stream.failure = OSError("another")
    out.write("b")
    out.flush()
    assert out.error is error and not out.isatty()


def test_no_stream_at_all_drops_everything():
    out = Output(None)
    assert out.write("a") == 1 and out.error is None and not out.isatty() and out.encoding == "utf-8"
    out.flush()


def test_streams_are_back_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with kept_open() as out, kept_open() as inner:
        print("±")
        assert isinstance(sys.stderr, Output) and out.error is inner.error is None
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "±\n"


def test_closed_descriptors_are_no_place_for_the_next_file(tmp_path):
    code = (
        "import os, sys; os.close(1); os.close(2)\n"
        "from digit.runtime.output import occupy_descriptors\n"
        "occupy_descriptors(); file = open(sys.argv[1], 'wb'); os.write(1, b'from C'); file.write(b'mine')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")]).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"mine"
    occupy_descriptors()  # open ones stay
    assert os.fstat(1)
