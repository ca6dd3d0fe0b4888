"""Condition maps of pictures and data sets, by the annotators of `conditions`."""
