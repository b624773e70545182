"""Serves every other package: files, locks, requests, progress, ranks, signals, hardware, settings, plots."""
