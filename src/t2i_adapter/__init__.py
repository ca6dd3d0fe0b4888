"""Train T2I-Adapters for Stable Diffusion XL. Importing this package loads no torch."""

__version__ = "0.1.0"
