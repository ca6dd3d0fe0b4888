"""How the embedded base `nano` is made: VAE, text encoders, UNet, measures, export. See `python -m ... --help`."""
