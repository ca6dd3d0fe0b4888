"""Generates pictures from prompts and condition pictures with an adapter."""
