"""What the paper measures, of a pipeline and images; each collects, computes in `evaluation/`, writes and returns.

A measure writes NAME.json (protocol, figures, intervals) and NAME.png into a folder, and returns what the JSON holds.
"""
