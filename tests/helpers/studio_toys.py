"""A toy pipeline for the studio's tests, the events of a job, and the studio served at a port of this machine."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from toy_images import PatchEncoder

from digit.data.preprocess import PreprocessConfig
from digit.data.shapes import CLASSES
from digit.models.pixels import PixelConfig, PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.studio.app import Studio
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.vq import VQTokenizer

SIZE, CODES, VQ_CODES = 32, 7, 11
SHAPE = dict(depth=1, embed_dim=16, num_heads=2)


PRIOR = SequenceConfig(vocab_size=CODES, target_len=16, num_classes=len(CLASSES), label_dropout=0.1, **SHAPE)
RENDERER = SequenceConfig(
    vocab_size=VQ_CODES, target_len=64, prefix_vocab_size=CODES, prefix_len=16, norm="pre", **SHAPE
)  # fmt: skip
PIXELS = PixelConfig(
    image_size=SIZE, prefix_vocab_size=CODES, prefix_len=16, prefix_rows=4, dropout=0.0, norm="pre", channels=8,
    channel_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4, noise_channels=2, **SHAPE,
)  # fmt: skip


def toy_vq() -> VQTokenizer:
    net = VQGANConfig(
        resolution=SIZE, channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, vocab_size=VQ_CODES,
        num_groups=4,
    )  # fmt: skip
    return VQTokenizer(VQGAN(net))


def studio_pipeline(kind: str = "ar", **changes) -> DigitPipeline:
    """Untrained: 32 px, 4 x 4 discriminative tokens of 7 codes, 8 x 8 VQ tokens of 11, the ten classes of shapes.

    `kind` of the renderer: ar, masked, pixels (no VQ tokens), or vq for VQ tokens alone. `changes` are of its config.
    """
    torch.manual_seed(0)
    preprocess, vq = PreprocessConfig(image_size=SIZE, encoder_size=SIZE), toy_vq()
    if kind == "vq":
        alone = SequenceConfig(vocab_size=VQ_CODES, target_len=64, num_classes=len(CLASSES), norm="pre", **SHAPE)
        return DigitPipeline(vq=vq, renderer=SequenceModel(alone), preprocess=preprocess, classes=CLASSES)
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(CODES, 3)))
    prior = SequenceModel(PRIOR)
    if kind == "pixels":
        renderer = PixelRenderer(replace(PIXELS, **changes))
    else:
        renderer = SequenceModel(replace(RENDERER, masked=kind == "masked", **changes))
    return DigitPipeline(
        tokenizer=tokenizer, vq=None if kind == "pixels" else vq, prior=prior, renderer=renderer, preprocess=preprocess,
        classes=CLASSES,
    )  # fmt: skip


class ToyJudge:
    """Mean colours of 4 x 4 cells."""

    def to(self, device):
        return self

    def pooled(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


class Events(list):
    """The events of a job: (kind, data)."""

    def only(self, kind: str) -> list[dict]:
        return [data for name, data in self if name == kind]


def events(response) -> Events:
    """What a stream of server-sent events holds; asserts that it is one."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = Events()
    for block in response.text.split("\n\n"):
        if block.startswith("event: "):
            kind, data = block.split("\n", 1)
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def serving(studio: Studio) -> Iterator[str]:
    """Serve in a thread, with a worker of its own that ends with it."""
    from digit.studio import serve

    own, address = Studio(studio.model, studio.folder), threading.Event()
    told: list[str] = []
    servers: list[serve.Server] = []
    original = serve.Server.startup

    async def startup(self, sockets=None):
        servers.append(self)
        await original(self, sockets=sockets)

    def ready(where: str) -> None:
        told.append(where)
        address.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve.Server, "startup", startup)
        arguments = dict(port=0, say=lambda line: None, ready=ready)
        thread = threading.Thread(target=serve.serve, args=(own,), kwargs=arguments, daemon=True)
        thread.start()
        assert address.wait(60), "the server did not start"
        yield told[0].rstrip("/")
        servers[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(true, seconds: float = 30.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False
