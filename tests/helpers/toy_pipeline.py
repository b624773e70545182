"""An untrained pipeline of toy sizes: for tests of what is drawn in which order, not of how it looks."""

import torch

from digit.data.preprocess import PreprocessConfig
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.tokenizers.vq import VQTokenizer

CLASSES = ("cat", "dog", "owl")
SHAPE = dict(depth=1, embed_dim=16, num_heads=2)


def toy_pipeline(seed: int = 0, *, prior: bool = True, masked: bool = False, num_classes: int = 3) -> DigitPipeline:
    """16 px images of 4 x 4 VQ tokens, 4 discriminative tokens; without prior a VQ-only baseline."""
    torch.manual_seed(seed)
    net = VQGANConfig(
        resolution=16, channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, vocab_size=11, num_groups=4
    )
    prefix = dict(prefix_vocab_size=7, prefix_len=4) if prior else dict(num_classes=num_classes)
    renderer = SequenceConfig(vocab_size=11, target_len=16, norm="pre", masked=masked, **prefix, **SHAPE)
    first = SequenceConfig(vocab_size=7, target_len=4, num_classes=num_classes, **SHAPE)
    return DigitPipeline(
        vq=VQTokenizer(VQGAN(net)),
        prior=SequenceModel(first) if prior else None,
        renderer=SequenceModel(renderer),
        preprocess=PreprocessConfig(image_size=16, encoder_size=16),
        classes=CLASSES[:num_classes],
    )
