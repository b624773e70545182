"""DiGIT: discriminative image tokens and autoregressive image generation.

    from digit import DigitPipeline
    pipe = DigitPipeline.from_pretrained("runs/demo")
    images = pipe.generate(num=16, seed=0)  # (16, 3, H, W) uint8

    import digit
    digit.evaluate(images, "photos/val")  # metrics of any images, of any generator

After "Stabilize the Latent Space for Image Autoregressive Modeling: A Unified Perspective" (NeurIPS 2024).
"""

from typing import TYPE_CHECKING, Any

from digit.runtime.version import __version__

if TYPE_CHECKING:
    from digit.evaluation.samples import evaluate
    from digit.pipeline.pipeline import DigitPipeline

__all__ = ["DigitPipeline", "__version__", "evaluate"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "DigitPipeline":  # imported on first use: `import digit` and `digit --help` stay quick without torch
        from digit.pipeline.pipeline import DigitPipeline

        return DigitPipeline
    if name == "evaluate":
        from digit.evaluation.samples import evaluate

        return evaluate
    raise AttributeError(f"module 'digit' has no attribute {name!r}")
