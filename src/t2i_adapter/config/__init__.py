"""The tree of options of a run, and how recipes and flags fill it. Importing this package loads no torch."""
