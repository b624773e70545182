"""Makes src/digit/assets/vqgan64.safetensors: one general VQGAN for 64 px, 8 x 8 tokens of 1024 codes.

    torchrun --standalone --nproc-per-node 2 bench/train_vqgan_asset.py \\
        --grocery DATA/grocery --cifar DATA/cifar10 --out runs/vqgan64

Trains on shaded toy scenes (40 %), grocery photographs (30 %, windows of images whose short side is 64 to 96) and
CIFAR-10 enlarged to 64 px (30 %); the batch is a function of the step. Every --save-every steps it writes the averaged
weights and a grid of held-out originals and reconstructions, so that the weights are usable at any time. The bundled
weights are from one run of this program whose length was changed on the way (`history` in
src/digit/assets/vqgan64.json). Use one process per core: other load on the machine slows two processes of one thread
less than one process of two.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runtime import distributed
from digit.runtime.files import save_tensors, sha256_tensors, write_json
from digit.training.loop import TrainState, train
from digit.training.vqgan import GANConfig, VQGANTrainer, evaluate_vqgan

SIZE, NUM_SHAPES, HELD_OUT = 64, 6000, 256
MODEL = VQGANConfig(
    resolution=SIZE,
    channels=16,
    channel_mult=(1, 2, 8, 8),
    num_res_blocks=1,
    num_groups=4,
    z_channels=32,
    vocab_size=1024,
)
MIXTURE = {"shapes": 0.4, "grocery": 0.3, "cifar10": 0.3}
TRAINING_DATA = {
    "shapes": f"{MIXTURE['shapes']:.0%}: {NUM_SHAPES} scenes of digit.data.shapes, seed 0",
    "grocery": f"{MIXTURE['grocery']:.0%}: 2,640 photographs of GroceryStoreDataset train (Klasson et al. 2019, MIT)",
    "cifar10": f"{MIXTURE['cifar10']:.0%}: 50,000 images of CIFAR-10 train (JPEG copy), enlarged to 64 px by bicubic",
}


def load_photographs(folder: Path) -> list[np.ndarray]:
    """Every JPEG below `folder` as uint8 (H, W, 3)."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.jpg"))]


def load_parquet(path: Path) -> np.ndarray:
    """The images of a Hub-layout Parquet file, uint8 (n, 32, 32, 3)."""
    import pyarrow.parquet as pq

    column = pq.read_table(path).column("img").to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in column])


def load_shapes(seed: int, number: int, cache: Path) -> np.ndarray:
    """Scenes 0..number-1 of a seed, uint8 (n, 64, 64, 3), rendered once."""
    from digit.data.shapes import render_scene

    path = cache / f"shapes_{seed}_{number}.npy"
    if not path.exists():
        np.save(path, np.stack([render_scene(seed, index, SIZE)[0] for index in range(number)]))
    return np.load(path)


def photograph_window(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A 64 px window of a photograph resized to a random short side of 64 to 96, bicubic."""
    height, width = image.shape[:2]
    side = min(height, width) * SIZE / rng.uniform(SIZE, 96)  # of the window in the photograph's own pixels
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def mixture(sources: dict[str, np.ndarray | list[np.ndarray]], batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """batches(step) -> uint8 (B, 3, 64, 64), flipped half of the time."""
    names, shares = list(MIXTURE), list(MIXTURE.values())
    prepare = {"shapes": lambda image, rng: image, "grocery": photograph_window, "cifar10": lambda i, rng: enlarged(i)}

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(names), batch_size, p=shares)
        images = [sample(names[number], rng) for number in chosen]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def sample(name: str, rng: np.random.Generator) -> np.ndarray:
        image = prepare[name](sources[name][rng.integers(len(sources[name]))], rng)
        return image[:, ::-1] if rng.random() < 0.5 else image

    return batch


def held_out(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """256 held-out images of each set, uint8 (n, 3, 64, 64)."""
    rng = np.random.default_rng(0)
    photographs, small = load_photographs(arguments.grocery / "val"), next(arguments.cifar.glob("test-*.parquet"))
    sets = {
        "grocery": np.stack([photograph_window(image, rng) for image in photographs[:HELD_OUT]]),
        "cifar10": np.stack([enlarged(image) for image in load_parquet(small)[:HELD_OUT]]),
        "shapes": load_shapes(1, HELD_OUT, arguments.out),
    }
    return {name: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() for name, images in sets.items()}


def save_grid(path: Path, vqgan: VQGAN, sets: dict[str, Tensor], number: int = 16) -> None:
    """Saves originals above reconstructions, two rows per set, enlarged by half."""
    rows = []
    for images in sets.values():
        images = images[:: len(images) // number][:number]
        with torch.no_grad():
            output = vqgan.decode_tokens(vqgan.encode(images.float() / 255)[1]).clamp(0, 1)
        rows += [torch.cat(list(half), 2) for half in (images, (output * 255).round().byte())]
    grid = torch.cat(rows, 1).permute(1, 2, 0).numpy()
    Image.fromarray(grid).resize((grid.shape[1] * 3 // 2, grid.shape[0] * 3 // 2), Image.Resampling.LANCZOS).save(path)


def write_asset(vqgan: VQGAN, sets: dict[str, Tensor], cfg: GANConfig, out: Path, step: int) -> dict[str, float]:
    """vqgan64.safetensors (fp16), vqgan64.json and a grid of the averaged weights. Returns PSNR by set."""
    number = HELD_OUT if step == cfg.num_steps else 64  # fewer during training
    half = {name: tensor.detach().half() for name, tensor in vqgan.state_dict().items()}
    shipped = VQGAN(MODEL)
    shipped.load_state_dict({name: tensor.float() for name, tensor in half.items()})  # score what is written
    metrics = {name: evaluate_vqgan(shipped, images[:number].split(64)) for name, images in sets.items()}
    save_grid(out / f"grid_{step:06d}.png", shipped, sets)
    save_tensors(out / "vqgan64.safetensors", half)
    about = {
        "config": MODEL.to_dict(),
        "fingerprint": sha256_tensors(shipped.state_dict()),
        "training_data": TRAINING_DATA,
        "command": f"bench/train_vqgan_asset.py --num-steps {cfg.num_steps}",
        "steps": step,
        "training": asdict(cfg),
        "held_out": metrics,
    }
    write_json(out / "vqgan64.json", about)
    return {f"psnr_{name}": metrics["psnr"] for name, metrics in metrics.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grocery", type=Path, required=True, help="folder with train/ and val/ of photographs")
    parser.add_argument("--cifar", type=Path, required=True, help="folder with CIFAR-10 in Hub-layout Parquet")
    parser.add_argument("--out", type=Path, required=True, help="log, checkpoints, grids, vqgan64.*; resumes from it")
    parser.add_argument("--num-steps", type=int, default=GANConfig.num_steps)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    distributed.start("cpu")
    cfg = GANConfig(
        num_steps=arguments.num_steps, adversarial_start=arguments.num_steps // 2, save_every=arguments.save_every
    )
    sources = {
        "grocery": load_photographs(arguments.grocery / "train"),
        "cifar10": load_parquet(next(arguments.cifar.glob("train-*.parquet"))),
        "shapes": load_shapes(0, NUM_SHAPES, arguments.out),
    }
    sets = held_out(arguments)
    trainer = VQGANTrainer(VQGAN(MODEL), mixture(sources, cfg.batch_size, cfg.seed), cfg)

    def validate(step: int) -> dict[str, float]:
        if not distributed.is_main():
            return {}
        with trainer.average.applied():
            return write_asset(trainer.vqgan, sets, cfg, arguments.out, step)

    train(trainer.update, TrainState(0, trainer.objects), cfg, arguments.out, validate=validate, description="vqgan64")
    distributed.stop()


if __name__ == "__main__":
    main()
