"""The tokenizer protocol, which lives in models/tokenizer.py."""

from digit.models.tokenizer import ImageTokenizer

__all__ = ["ImageTokenizer"]
