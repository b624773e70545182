"""Metrics of images, features, tokens or a callable from any source; imports only models, runtime and errors."""
