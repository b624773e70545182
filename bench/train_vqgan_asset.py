"""The program that made src/digit/assets/vqgan64.safetensors: one general VQGAN for 64 px, 8 x 8 tokens of 1024 codes.

    python bench/train_vqgan_asset.py --grocery DATA/grocery --cifar DATA/cifar10 --out runs/vqgan64

Trains on shaded toy scenes (40 %), grocery photographs (30 %, windows of images whose short side is 64 to 96) and
CIFAR-10 enlarged to 64 px (30 %); the batch is a function of the step. Every --save-every updates it writes the averaged
weights and a grid of held-out originals and reconstructions, so that the weights can be taken at any time.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit.models.vqgan import VQGAN, VQGANConfig
from digit.training import distributed
from digit.training.gan import GANConfig, VQGANTrainer, evaluate_vqgan

SIZE = 64
MODEL = VQGANConfig(
    resolution=SIZE, channels=16, channel_mult=(1, 2, 8, 8), num_res_blocks=1, z_channels=32, vocab_size=1024, num_groups=4
)
MIXTURE = {"shapes": 0.4, "grocery": 0.3, "cifar10": 0.3}
logger = logging.getLogger("vqgan_asset")


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
    names = [name for name in MIXTURE if name in sources]
    shares = np.array([MIXTURE[name] for name in names])
    prepare = {"shapes": lambda image, rng: image, "grocery": photograph_window, "cifar10": lambda i, rng: enlarged(i)}

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(names), batch_size, p=shares / shares.sum())
        images = [draw(names[number], rng) for number in chosen]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def draw(name: str, rng: np.random.Generator) -> np.ndarray:
        image = prepare[name](sources[name][rng.integers(len(sources[name]))], rng)
        return image[:, ::-1] if rng.random() < 0.5 else image

    return batch


def held_out(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Held-out images of each set, uint8 (n, 3, 64, 64)."""
    rng = np.random.default_rng(0)
    photographs = load_photographs(arguments.grocery / "val")
    sets = {
        "grocery": np.stack([photograph_window(image, rng) for image in photographs[:256]]),
        "cifar10": np.stack([enlarged(i) for i in load_parquet(next(arguments.cifar.glob("test-*.parquet")))[:256]]),
    }
    if arguments.shapes:
        sets["shapes"] = load_shapes(1, 256, arguments.out)
    return {name: torch.from_numpy(images).permute(0, 3, 1, 2) for name, images in sets.items()}


def save_grid(path: Path, vqgan: VQGAN, sets: dict[str, Tensor], number: int = 16) -> None:
    """Originals above reconstructions, two rows a set, enlarged twice."""
    rows = []
    for images in sets.values():
        images = images[:: max(1, len(images) // number)][:number]
        with torch.no_grad():
            output = vqgan.decode_tokens(vqgan.encode(images.float() / 255)[1]).clamp(0, 1)
        rows += [torch.cat(list(half), 2) for half in (images, (output * 255).round().byte())]
    grid = torch.cat(rows, 1).permute(1, 2, 0).numpy()
    Image.fromarray(grid).resize((grid.shape[1] * 3 // 2, grid.shape[0] * 3 // 2), Image.Resampling.LANCZOS).save(path)


def save(trainer: VQGANTrainer, sets: dict[str, Tensor], arguments: argparse.Namespace, step: int, seconds: float) -> None:
    from safetensors.torch import save_file

    state = {name: thing.state_dict() for name, thing in trainer.objects.items()}
    torch.save({"step": step, **state}, arguments.out / "state.pt")
    vqgan = trainer.average.model
    number = 256 if step == trainer.config.num_steps else 64  # a quick look on the way
    metrics = {name: evaluate_vqgan(vqgan, images[:number].split(64)) for name, images in sets.items()}
    logger.info("step %d after %.0f s: %s", step, seconds, json.dumps(metrics))
    save_grid(arguments.out / f"grid_{step:06d}.png", vqgan, sets)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in vqgan.state_dict().items()}
    save_file(tensors, arguments.out / "vqgan64.safetensors")
    about = {
        "model": MODEL.to_dict(),
        "training": asdict(trainer.config),
        "data": {**{n: MIXTURE[n] for n in sets}, "num_shapes": arguments.shapes},
        "steps": step,
        "seconds": round(seconds),
        "held_out": metrics,
    }
    (arguments.out / "vqgan64.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grocery", type=Path, required=True, help="folder with train/ and val/ of grocery photographs")
    parser.add_argument("--cifar", type=Path, required=True, help="folder with CIFAR-10 in Hub-layout Parquet")
    parser.add_argument("--shapes", type=int, default=8000, help="scenes rendered for training; 0 leaves them out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-steps", type=int, default=GANConfig.num_steps)
    parser.add_argument("--adversarial-start", type=int, default=GANConfig.adversarial_start)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of GANConfig, as JSON")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = GANConfig(num_steps=arguments.num_steps, adversarial_start=arguments.adversarial_start)
    config = replace(config, **{k: json.loads(v) for k, v in (pair.split("=") for pair in arguments.set)})
    distributed.start("cpu")
    sources = {
        "grocery": load_photographs(arguments.grocery / "train"),
        "cifar10": load_parquet(next(arguments.cifar.glob("train-*.parquet"))),
    }
    if arguments.shapes:
        sources["shapes"] = load_shapes(0, arguments.shapes, arguments.out)
    sets = held_out(arguments)
    trainer = VQGANTrainer(VQGAN(MODEL), mixture(sources, config.batch_size, config.seed), config)
    start = time.monotonic()
    first = 0
    if (arguments.out / "state.pt").exists():
        state = torch.load(arguments.out / "state.pt", weights_only=True)
        first = state.pop("step")
        for name, value in state.items():
            trainer.objects[name].load_state_dict(value)
    for step in range(first, config.num_steps):
        figures = trainer.update(step)
        if not distributed.is_main():
            continue
        if step % 25 == 0:
            logger.info("%d %.0fs %s", step, time.monotonic() - start, {k: float(f"{v:.3g}") for k, v in figures.items()})
        if (step + 1) % arguments.save_every == 0 or step + 1 == config.num_steps:
            save(trainer, sets, arguments, step + 1, time.monotonic() - start)


if __name__ == "__main__":
    main()
