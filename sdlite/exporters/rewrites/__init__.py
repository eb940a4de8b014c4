"""Graphs to graphs of another arithmetic or another shape, for the targets that need it."""
