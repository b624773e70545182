"""Measures the speed of each stage on this machine, beside a floor measured in the same run.

`python -m digit.benchmark` needs torch, numpy, pillow, safetensors and jaxtyping only. A floor is the time of the work
that no implementation can avoid: the same matrix multiplications alone, a memory copy, or JPEG decoding alone.
"""
