"""A run: recipe, stages, status and report of one folder."""
