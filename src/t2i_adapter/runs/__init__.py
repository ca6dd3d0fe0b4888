"""Reads a run from its folder alone, and shows it: state, page, lists, comparison. Nothing in here imports torch."""
