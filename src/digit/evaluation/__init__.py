"""Evaluations of the paper, of a pipeline or of image sets, with the metrics of `metrics/`.

Each evaluation writes NAME.json (protocol, metrics, intervals) and NAME.png into a folder, and returns the former.
"""
