"""The base (SDXL, or Stable Diffusion 1 or 2, frozen), its text encoders and VAE as functions, and the adapter with its
record."""
