"""Estimates memory, time, disk space and cost of every stage before anything runs (`digit plan`)."""
