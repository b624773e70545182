"""A small renderer straight to pixels and its batches: tokens name the colours of its four quarters."""

from dataclasses import replace

import torch
from torch import Tensor

from digit.models.pixels import PixelConfig, PixelRenderer
from digit.training.adversarial import AdversarialConfig
from digit.training.pixels import PixelTrainer

TINY = PixelConfig(
    image_size=16, prefix_vocab_size=4, prefix_len=4, prefix_rows=2, depth=1, embed_dim=16, num_heads=2, dropout=0.0,
    norm="pre", channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4,
)  # fmt: skip
QUICK = AdversarialConfig(
    num_steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=0, precision="fp32", perceptual="none",
    adversarial_start=40, adversarial_ramp=5, discriminator_channels=8, log_every=10, save_every=20,
    ema_decay=0.9, tensorboard=False,
)  # fmt: skip
COLOURS = torch.tensor([[230, 40, 40], [40, 230, 40], [40, 40, 230], [200, 200, 200]], dtype=torch.uint8)


def model(**changes) -> PixelRenderer:
    torch.manual_seed(0)
    return PixelRenderer(replace(TINY, **changes))


class Batches:
    """Quarters of plain colour, and the tokens that name them."""

    def part(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        prefix = torch.randint(4, (QUICK.batch_size, 4), generator=generator)[start:stop]
        quarters = COLOURS[prefix].view(-1, 2, 2, 3).permute(0, 3, 1, 2)  # (B, 3, 2, 2)
        return {"target": quarters.repeat_interleave(8, 2).repeat_interleave(8, 3), "prefix": prefix}


def weights_after_three_steps() -> dict[str, Tensor]:
    trainer = PixelTrainer(model(noise_channels=2), Batches(), replace(QUICK, adversarial_start=1))
    for step in range(3):
        trainer.update(step)
    return trainer.renderer.state_dict()
