"""Small networks in the files of other projects, with the names of bench/stand_in_vq.py."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

from digit.models.vqgan import VQGAN, VQGANConfig

SCRIPT = Path(__file__).parents[2] / "bench/stand_in_vq.py"
if "stand_in_vq" not in sys.modules:
    spec = importlib.util.spec_from_file_location("stand_in_vq", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["stand_in_vq"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["stand_in_vq"])
stand_ins = sys.modules["stand_in_vq"]

FORMATS = ("llamagen", "diffusers", "open_magvit2", "taming_gumbel", "maskgit", "ibq", "taming")
FULL_SIZE = {stand_in.format: stand_in for stand_in in reversed(stand_ins.STAND_INS.values())}


def small(form: str, **changes: object) -> VQGAN:
    """A network of one format with random weights: by default 16 px, 8 x 8 tokens, a change of width, attention."""
    torch.manual_seed(0)
    layout = FULL_SIZE[form].layout
    sizes = {"resolution": 16, "channels": 32, "channel_mult": (1, 2), "z_channels": 4, "vocab_size": 16}
    cfg = VQGANConfig(num_res_blocks=1, **(sizes | changes))
    layout = replace(
        layout,
        attention_levels=(len(cfg.channel_mult) - 1,) if layout.mid_attention else (),
        quant_channels=6 if layout.quant_channels else 0,
        mid_blocks=min(layout.mid_blocks, 3),
    )
    vqgan = VQGAN(cfg, layout).eval()
    for parameter in vqgan.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vqgan


def write(form: str, folder: Path, vqgan: VQGAN) -> Path:
    """Its file, or diffusers' folder."""
    return write_state(form, folder, stand_ins.foreign_state(form, vqgan))


def write_state(form: str, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A file of a format from tensors under the format's own names."""
    path = folder / f"{form}.ckpt"
    torch.save(stand_ins.file_content(form, state), path)
    return path
