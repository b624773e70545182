"""The package's version, for what it writes."""

__version__ = "0.2.0"
