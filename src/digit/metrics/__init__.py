"""Protocols that score images, features or a callable, whoever made them; a leaf: nothing of the models is imported."""
