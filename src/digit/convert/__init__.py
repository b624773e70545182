"""Converts released checkpoints to DiGIT's state dicts, one module per format; every tensor is accounted for."""
