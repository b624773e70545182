"""Vision encoders of the transformers library (extra `hub`) behind the same face as our own nets.

Patch tokens are taken from the output of one block and pass the model's final LayerNorm where it has one, as with our
ViT; class and register tokens stand in front and are dropped. Later blocks are removed.
"""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.runtime.files import read_json
from digit.runtime.paths import is_path, nearest

FINAL_NORMS = ("layernorm", "post_layernorm", "norm")
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A transformers vision model as its own config says, cut behind `num_blocks`."""

    model: dict[str, Any]
    """The model's config as a dict."""
    num_blocks: int
    """Blocks kept."""

    def __post_init__(self) -> None:
        plain = json.loads(json.dumps(self.model, default=str, sort_keys=True))  # as it comes back from a JSON file
        drop = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # they do not change the features
        object.__setattr__(self, "model", {key: value for key, value in plain.items() if key not in drop})


class HubNet(nn.Module):
    """A transformers vision model, cut behind its last needed block, with `forward`, `pooled`, `dim` and `grid`."""

    def __init__(self, cfg: HubConfig, model: Any):
        super().__init__()
        self.cfg = cfg
        self.model: Any = model  # of the transformers library: its config is no type of ours
        blocks = find_blocks(model)
        del blocks[cfg.num_blocks :]
        self.patch_size = int(model.config.patch_size)
        self._takes = inspect.signature(model.forward).parameters.keys()
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0  # MAE hides three quarters of the patches unless told otherwise
        self._last: list[Tensor] = []
        blocks[-1].register_forward_hook(self._keep)

    @classmethod
    def from_state(cls, cfg: HubConfig, state: Mapping[str, Tensor]) -> "HubNet":
        """Build from a saved config and exactly the saved tensors."""
        transformers = import_transformers()
        model_type = cfg.model["model_type"]
        whole = transformers.AutoConfig.for_model(**({"model_type": model_type} | cfg.model))
        net = cls(cfg, vision_part(transformers.AutoModel.from_config(whole)))
        net.load_state_dict(dict(state))
        return net.eval()

    # a hook, not hidden_states: the library's versions differ in what the last of these holds
    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._last.append(output if isinstance(output, Tensor) else output[0])

    @property
    def dim(self) -> int:
        """Channels D of the features."""
        return int(self.model.config.hidden_size)

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return size // self.patch_size, size // self.patch_size

    def tokens(self, x: Tensor) -> Tensor:
        """All tokens (B, L, D) behind the last kept block and the final norm."""
        self._last.clear()
        order = torch.arange(float(math.prod(self.grid(x.shape[-1]))), device=x.device).expand(len(x), -1)  # (B, N)
        options = {"interpolate_pos_encoding": True, "noise": order}  # noise: MAE sorts the patches by it
        self.model(pixel_values=x, **{name: value for name, value in options.items() if name in self._takes})
        hidden = self._last.pop()  # (B, L, D)
        norm = next((getattr(self.model, name) for name in FINAL_NORMS if hasattr(self.model, name)), None)
        return hidden if norm is None else norm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) to patch features (B, N, D) in raster order."""
        rows, columns = self.grid(x.shape[-1])
        return self.tokens(x)[:, -rows * columns :]

    def pooled(self, x: Tensor) -> Tensor:
        """The first token in front of the patches (class token), or the patches' mean where there is none."""
        tokens = self.tokens(x)
        rows, columns = self.grid(x.shape[-1])
        return tokens[:, 0] if tokens.shape[1] > rows * columns else tokens.mean(1)


def find_blocks(model: Any) -> nn.ModuleList:
    """The list of transformer blocks. Raises DigitError where the model is no plain ViT."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1 or not isinstance(getattr(model.config, "patch_size", None), int):
        kind = type(model).__name__
        raise DigitError(f"{kind} is no plain vision transformer: choose a ViT such as DINOv2 or MAE")
    return lists[0]


def vision_part(model: Any) -> Any:
    """The image half of a model of images and text (CLIP, SigLIP); other models as they are."""
    return getattr(model, "vision_model", model)


def import_transformers() -> Any:
    """The transformers library, or a DigitError with its pip command."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]  # the optional extra `hub`
    except ImportError as error:
        raise DigitError("encoders hf:<name> need the transformers library: pip install transformers") from error
    return transformers


def load_hub(name: str, input_size: int) -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
    """(vision model, its number of blocks, mean, std) of a model on the Hub or in a local folder, in float32."""
    folder = Path(name).expanduser()
    if is_path(name) and not folder.is_dir():
        raise DigitError(
            f"encoder hf:{name}: {folder} does not exist{nearest(folder)}: give a folder, or hf:OWNER/MODEL"
        )
    name = str(folder) if is_path(name) else name
    transformers = import_transformers()
    mean, std = read_processor(name)
    try:
        model = vision_part(transformers.AutoModel.from_pretrained(name, dtype=torch.float32)).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DigitError(f"cannot load hf:{name} ({reason}): check the name, or give a folder") from error
    depth = len(find_blocks(model))
    if input_size % model.config.patch_size:
        raise DigitError(f"hf:{name} has patches of {model.config.patch_size}: input_size {input_size} is no multiple")
    return model, depth, mean, std


def read_processor(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, for images in 0..1, out of the model's preprocessor_config.json."""
    path = Path(name) / PROCESSOR
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(name, PROCESSOR))
        except Exception as error:  # the library raises HTTP, OS, validation and its own errors here
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DigitError(f"cannot fetch {PROCESSOR} of hf:{name} ({reason}): check name and network") from error
    processor = read_json(path)
    if not isinstance(processor, dict):
        raise DigitError(f"{path} is no image processor: expected a JSON object")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    if (
        mean is None
        or std is None
        or not all(
            isinstance(v, list) and len(v) == 3 and all(isinstance(c, int | float) for c in v) for v in (mean, std)
        )
    ):
        raise DigitError(f"{path} gives no image_mean and image_std of 3 channels: is hf:{name} an image encoder?")
    return tuple(float(c) for c in mean), tuple(float(c) for c in std)
