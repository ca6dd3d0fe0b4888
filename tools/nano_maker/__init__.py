"""The program that makes the embedded base `nano`: it trains VAE, text encoders and UNet, exports and measures them.

`PYTHONPATH=tools python -m nano_maker --help` lists its stages; docs/nano.md explains them.
"""
