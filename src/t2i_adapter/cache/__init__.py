"""The cache: moments, conditions and text states of a dataset, computed once and stored by content."""
