"""Finds what is wrong with a dataset before a training run is paid for."""
