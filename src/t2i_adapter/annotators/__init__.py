"""Annotators: plug-ins that make the condition map of an image, and their registry."""
