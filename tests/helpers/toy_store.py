"""Token stores of noise pictures: tokenizers without weights, a writer of small stores, the bytes of a folder."""

from pathlib import Path

import torch
from toy_images import NoiseSource

from digit.data.preprocess import PreprocessConfig
from digit.data.token_writer import write_tokens
from digit.data.tokens import TokenStore

SMALL = PreprocessConfig(image_size=8, encoder_size=8)


class Stop(Exception):
    """The kill."""


class ToyTokenizer:
    """A token is the sum of its cell's pixels; ends the run at call number `stop_at`."""

    def __init__(self, side: int = 2, vocab_size: int = 1000, name: str = "toy", stop_at: int | None = None, stop=None):
        self.grid, self.vocab_size, self.fingerprint = (side, side), vocab_size, f"{name}-{vocab_size}-{side}"
        self.calls, self.stop_at, self.stop = 0, stop_at, stop

    def encode(self, images):
        self.calls += 1
        if self.calls == self.stop_at:
            (self.stop or self._raise)()
        cells = torch.nn.functional.adaptive_avg_pool2d(images.double(), self.grid[0]).sum(1).flatten(1)
        return (cells * 100).round().long() % self.vocab_size

    def _raise(self):
        raise Stop


def write(folder: Path, *, source=None, discriminative=None, vq=None, **changes) -> TokenStore:
    settings = dict(crops_per_image=3, seed=5, batch_size=4, max_bad_fraction=0.5) | changes
    preprocess = settings.pop("preprocess", SMALL)
    discriminative, vq = discriminative or ToyTokenizer(), vq or ToyTokenizer(4, 65536, "vq")
    return write_tokens(folder, source or NoiseSource(), preprocess, discriminative, vq, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
