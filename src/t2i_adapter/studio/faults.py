"""What a route may answer instead: nothing has this name, or a `UserError` of a kind that has a status of its own."""

CONFLICT, CHANGED, UNREADABLE, READ_ONLY = "conflict", "changed", "unreadable", "read_only"
"""Kinds of `UserError`: not in this state, edited meanwhile, no picture, a layout that cannot be edited."""


class NotFoundError(Exception):
    """Nothing has this id."""
