"""Makes src/digit/assets/vqgan64_shapes.safetensors: the bundled 64 px VQGAN, fine-tuned on rendered shapes.

    torchrun --nproc-per-node 2 bench/finetune_shapes_vqgan.py --out runs/vqgan64_shapes

Starts from vqgan64, trains on scenes of `shapes:num=6000,size=64,seed=0`, and writes weights, description, metrics and
a grid of held-out scenes (seed 1) above their reconstructions. On CPUs, two processes of one thread are faster than one
process of two.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from digit.data.shapes import ShapesSource
from digit.models.perceptual import EncoderDistance
from digit.runtime import distributed, plots
from digit.runtime.files import write_json
from digit.tokenizers.encoders import EncoderConfig, load_encoder
from digit.tokenizers.vq import load_asset_vqgan, save_asset
from digit.training.vqgan import GANConfig, evaluate_vqgan, train_vqgan

NUM_SCENES = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-steps", type=int, default=1800)
    parser.add_argument("--start", default="vqgan64", help="bundled VQGAN to start from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.start("cpu")
    cfg = GANConfig(
        num_steps=args.num_steps, batch_size=16, learning_rate=1e-3, codebook_start=0, perceptual="encoder",
        perceptual_weight=1.0, perceptual_crop=0, adversarial_weight=0.1, adversarial_start=args.num_steps * 2 // 3,
        save_every=300,
    )  # fmt: skip
    # perceptual loss on classifier features, not VGG's textures: shapes must stay recognisable through 64 tokens
    lite0 = load_encoder(EncoderConfig(name="efficientnet_lite0", layer="pooled", input_size=128)).net
    scenes, held_out = (read(ShapesSource(num=n, size=64, seed=s)) for n, s in ((NUM_SCENES, 0), (256, 1)))

    def batch(step: int) -> torch.Tensor:
        rows = np.random.default_rng([0, step]).integers(len(scenes), size=cfg.batch_size)
        images = scenes[rows]
        flipped = torch.from_numpy(np.random.default_rng([1, step]).random(len(rows)) < 0.5)
        return torch.where(flipped[:, None, None, None], images.flip(3), images)

    vqgan = load_asset_vqgan(args.start).vqgan.train()
    train_vqgan(vqgan, batch, cfg, args.out, perceptual=EncoderDistance(lite0))
    if distributed.is_main():
        metrics = evaluate_vqgan(vqgan, held_out.split(64))
        about = {
            "command": f"torchrun --nproc-per-node 2 bench/finetune_shapes_vqgan.py --num-steps {args.num_steps}",
            "start": args.start,
            "perceptual": "EncoderDistance(efficientnet_lite0)",
            "data": f"shapes:num={NUM_SCENES},size=64,seed=0",
            "training": asdict(cfg),
            "held_out": {"shapes": metrics},
        }
        save_asset(vqgan, args.out / "vqgan64_shapes", about)
        write_json(args.out / "metrics.json", metrics)
        shown = held_out[:40]
        output = vqgan.decode_tokens(vqgan.encode(shown.float() / 255)[1]).detach().clamp(0, 1).mul(255).round().byte()
        rows = [part for pair in zip(shown.split(10), output.split(10), strict=True) for part in pair]
        plots.save_png(args.out / "grid.png", plots.grid(torch.cat(rows), 10, scale=2))
    distributed.stop()


def read(source: ShapesSource) -> torch.Tensor:
    """Renders every scene: uint8 (n, 3, 64, 64)."""
    return torch.from_numpy(np.stack([np.asarray(source.read(i)[0]) for i in range(len(source))])).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
