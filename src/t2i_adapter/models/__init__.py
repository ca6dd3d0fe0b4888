"""The base (SDXL, frozen), its text encoders and VAE as functions, and the adapter with its record."""
