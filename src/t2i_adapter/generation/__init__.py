"""Prompt + condition picture + adapter -> pictures."""
