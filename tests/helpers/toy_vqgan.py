"""A tiny VQGAN, its training settings and its images, for tests in one process or in several."""

from dataclasses import replace

import torch
from torch import Tensor

from digit.models.vqgan import VQGAN, VQGANConfig
from digit.training.vqgan import GANConfig, VQGANTrainer

TINY = VQGANConfig(
    resolution=16, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=2, z_channels=4, vocab_size=16
)
QUICK = GANConfig(
    num_steps=8, batch_size=4, warmup_steps=2, codebook_start=2, adversarial_start=4, adversarial_ramp=2,
    restart_every=2, perceptual="none", discriminator_channels=4, precision="fp32", log_every=1, save_every=4,
    tensorboard=False,
)  # fmt: skip


def batches(step: int) -> Tensor:
    """Flat coloured images with a bright square, a function of the step: uint8 (4, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 200, (4, 3, 1, 1), generator=generator).expand(4, 3, 16, 16).clone()
    images[:, :, 4:10, 6:12] = 255 - images[:, :, 4:10, 6:12]
    return images.to(torch.uint8)


def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(TINY)


def weights_after_three_steps() -> dict[str, Tensor]:
    cfg = replace(QUICK, codebook_start=0, restart_below=0.0, adversarial_weight=0.0, max_norm=0.0)
    trainer = VQGANTrainer(model(), batches, cfg)
    for step in range(3):
        trainer.update(step)
    return trainer.vqgan.state_dict()
