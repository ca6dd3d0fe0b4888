"""The verbs of `t2i-adapter`, one file each. Importing a file loads its options and no torch."""
