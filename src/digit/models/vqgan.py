"""VQGAN: convolutional encoder, quantiser, convolutional decoder (Esser et al. 2021; the paper, section 3.3).

The default layout is that of MAGE's `vqgan_jax_strongaug.ckpt`, which the paper's renderer was trained on, so that its
weights load without surgery. It differs from the original VQGAN: no attention, no quant_conv / post_quant_conv,
residual convolutions without bias, 2x2 average pooling for downsampling, a 1x1 encoder output, and a channel-changing
residual block whose 1x1 shortcut reads the residual BRANCH's output, not the block's input. `VQLayout` describes the
layouts of other published tokenizers, the original one among them.

Shapes: B images, S pixels a side, f = 2 ** (levels - 1) the reduction, H = S / f, M = H * H tokens, C = z_channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from jaxtyping import Float, Int64
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.vq_blocks import DecoderLevel, EncoderLevel, Middle, NormSwish, conv3x3
from digit.models.vq_layout import MAGE, VQLayout
from digit.models.vq_quantizers import QUANTIZERS, ResidualQuantizer
from digit.runtime.settings import check_settings, within

MAX_LEVELS, MAX_RES_BLOCKS = 12, 64  # larger numbers in a file are errors


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of a VQGAN. The defaults are MAGE's 256 px, f16 tokenizer (54 M parameters)."""

    resolution: int = within("[1, 4096]", 256)
    """Image side in pixels, a multiple of the reduction 2 ** (len(channel_mult) - 1)."""
    channels: int = within("[1, inf)", 128)
    """Channels of the full-resolution level."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in units of `channels`; every level after the first halves the side."""
    num_res_blocks: int = within("[1, inf)", 2)
    """Residual blocks per level, the same in encoder and decoder."""
    z_channels: int = within("[1, inf)", 256)
    """Features of a code vector."""
    vocab_size: int = within("[1, inf)", 1024)
    """Number of codes, of each level."""
    num_levels: int = within("[1, 16]", 1)
    """Codes of each cell: residual quantisation (Lee et al. 2022), each level codes what the levels before it leave.
    Finer pictures from a grid of the same size; the next-token renderer predicts the codes of a cell one after another
    at one position. The paper has 1."""
    num_groups: int = within("[1, inf)", 32)
    """Groups of every GroupNorm. The released layout has 32; a small net needs several channels per group."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        check_settings(self)
        if not 1 <= len(self.channel_mult) <= MAX_LEVELS or min(self.channel_mult) < 1:
            raise DigitError(f"channel_mult is {self.channel_mult}: wanted 1 to {MAX_LEVELS} numbers of at least 1")
        if self.num_res_blocks > MAX_RES_BLOCKS:
            raise DigitError(f"num_res_blocks is {self.num_res_blocks}: choose 1 to {MAX_RES_BLOCKS}")
        if self.resolution % self.reduction:
            raise DigitError(
                f"resolution {self.resolution} is not a multiple of {self.reduction}, the reduction of "
                f"{len(self.channel_mult)} levels: choose another resolution or fewer channel_mult entries"
            )
        uneven = [c for c in self.level_channels if c % self.num_groups]
        if uneven:
            raise DigitError(
                f"GroupNorm wants channels divisible by num_groups {self.num_groups}, got {uneven[0]}: "
                "choose other channels or num_groups"
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * mult for mult in self.channel_mult)

    @property
    def reduction(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.resolution // self.reduction
        return side, side

    @property
    def num_tokens(self) -> int:
        """Tokens of an image; of several levels, the codes of each cell follow one another."""
        return self.grid[0] * self.grid[1] * self.num_levels

    def to_dict(self) -> dict:
        about = {**asdict(self), "channel_mult": list(self.channel_mult)}
        if self.num_levels == 1:
            del about["num_levels"]  # as in descriptions of older versions
        return about


class Encoder(nn.Module):
    def __init__(self, cfg: VQGANConfig, layout: VQLayout = MAGE) -> None:
        super().__init__()
        widths, last = cfg.level_channels, len(cfg.level_channels) - 1
        self.conv_in = conv3x3(3, widths[0], layout.bias)
        self.down = nn.ModuleList(
            EncoderLevel(
                [widths[max(level - 1, 0)]] + [width] * cfg.num_res_blocks,
                cfg.num_groups,
                layout,
                attention=level in layout.attention_levels,
                downsample=level < last,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], cfg.num_groups, layout)
        self.norm_out = NormSwish(cfg.num_groups, widths[-1])
        kernel, channels = layout.encoder_kernel, layout.quant_channels or cfg.z_channels
        self.conv_out = nn.Conv2d(widths[-1], channels, kernel, padding=kernel // 2)
        if layout.quant_channels:
            self.quant_conv = nn.Conv2d(channels, cfg.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, C, H, H)
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.conv_out(self.norm_out(self.mid(x)))
        return self.quant_conv(x) if hasattr(self, "quant_conv") else x


class Decoder(nn.Module):
    def __init__(self, cfg: VQGANConfig, layout: VQLayout = MAGE) -> None:
        super().__init__()
        widths, last = cfg.level_channels, len(cfg.level_channels) - 1
        channels, num_blocks = layout.quant_channels or cfg.z_channels, cfg.num_res_blocks + layout.extra_decoder_blocks
        if layout.quant_channels:
            self.post_quant_conv = nn.Conv2d(cfg.z_channels, channels, 1)
        self.conv_in = conv3x3(channels, widths[-1], bias=True)
        self.mid = Middle(widths[-1], cfg.num_groups, layout)
        self.up = nn.ModuleList(
            DecoderLevel(
                [widths[min(level + 1, last)]] + [width] * num_blocks,
                cfg.num_groups,
                layout,
                attention=level in layout.attention_levels,
                upsample=level > 0,
                z_channels=cfg.z_channels,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = NormSwish(cfg.num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:  # (B, C, H, H) -> (B, 3, S, S)
        x = self.mid(self.conv_in(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z))
        for level in reversed(self.up):
            x = level(x, z)
        return self.conv_out(self.norm_out(x))


class VQGAN(nn.Module):
    """Image tokenizer. Images and reconstructions are float in [0, 1]; reconstructions may overshoot, clamp them.

    `encoder` and `decoder` see pixels as the layout has them, in [0, 1] or in [-1, 1].
    """

    def __init__(self, cfg: VQGANConfig, layout: VQLayout = MAGE) -> None:
        """Raises DigitError where the layout does not fit the sizes."""
        super().__init__()
        layout.check(len(cfg.channel_mult), cfg.z_channels, cfg.vocab_size)
        if cfg.num_levels > 1 and layout.quantizer != "nearest":
            raise DigitError(f"num_levels is {cfg.num_levels}, and a quantiser {layout.quantizer} has one: set it to 1")
        self.cfg, self.layout = cfg, layout
        self.encoder = Encoder(cfg, layout)
        self.decoder = Decoder(cfg, layout)
        if cfg.num_levels > 1:
            self.quantize = ResidualQuantizer(cfg.vocab_size, cfg.z_channels, cfg.num_levels)
        else:
            self.quantize = QUANTIZERS[layout.quantizer](cfg.vocab_size, cfg.z_channels)

    def features(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C H H"]:
        """Images in [0, 1] -> features before quantisation."""
        return self.encoder(images * 2 - 1 if self.layout.signed_pixels else images)

    def encode(self, images: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B C H H"], Int64[Tensor, "B M"]]:
        """Images in [0, 1] -> features before quantisation (B, C, H, H) and tokens (B, M), row by row.

        Of several levels, M = H * H * L, the L codes of a cell one after another.
        """
        z = self.features(images)
        return z, self.quantize(z)[1].flatten(1)

    def decode(self, z: Float[Tensor, "B C H H"]) -> Float[Tensor, "B 3 S S"]:
        """Code vectors -> images, nominally in [0, 1]."""
        pixels = self.decoder(z)
        return (pixels + 1) / 2 if self.layout.signed_pixels else pixels

    def decode_tokens(self, tokens: Int64[Tensor, "B M"]) -> Float[Tensor, "B 3 S S"]:
        """Tokens (B, M) in [0, vocab_size) -> images (B, 3, S, S), nominally in [0, 1]."""
        return self.decode(self.quantize.lookup(self.cells(tokens, self.cfg.grid)))

    def cells(self, tokens: Int64[Tensor, "B M"], grid: tuple[int, int]) -> Int64[Tensor, "B H W ..."]:
        """Tokens (B, M) on their grid; of several levels, with those of each cell as the last dimension."""
        levels = (self.cfg.num_levels,) if self.cfg.num_levels > 1 else ()
        return tokens.view(-1, *grid, *levels)

    def forward(
        self, images: Float[Tensor, "B 3 S S"]
    ) -> tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B C H H"], Int64[Tensor, "B M"]]:
        """Reconstruction (B, 3, S, S) with a straight-through gradient, z (B, C, H, H), tokens (B, M)."""
        z = self.features(images)
        codes, indices = self.quantize(z)
        return self.decode(z + (codes - z).detach()), z, indices.flatten(1)
