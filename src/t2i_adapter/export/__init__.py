"""Writes a finished adapter as a folder with a model card, and uploads it to the hub."""
