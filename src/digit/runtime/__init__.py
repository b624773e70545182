"""What serves every room: files, locks, progress, ranks, signals, hardware, settings, plots."""
