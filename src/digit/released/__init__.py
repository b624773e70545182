"""Converts released checkpoints, given or downloaded, into a pipeline folder."""
