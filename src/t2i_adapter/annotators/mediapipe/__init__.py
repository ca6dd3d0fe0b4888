"""Poses and person masks by MediaPipe's networks, whose weights come from its packages on PyPI."""
