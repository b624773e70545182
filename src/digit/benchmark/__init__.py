"""How fast each stage is on this machine, beside the floor that the machine sets, measured in the same run.

Needs torch, numpy, pillow, safetensors and jaxtyping alone: `python -m digit.benchmark` runs where nothing else is.
A floor is the work that no implementation can leave out: the same matrix products alone, a memory copy, JPEG decoding
alone.
"""
