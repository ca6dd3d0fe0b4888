"""Measures how well generated pictures follow their conditions."""
