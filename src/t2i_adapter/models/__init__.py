"""The frozen base, its text encoders and VAE, and the adapter."""
