"""Names of the files in the studio's own folder."""

REQUEST, RESULT, PROGRESS, CANCELLED = "request.json", "result.json", "progress", "cancelled"
"""In the folder of a request to the painter: what is asked for, what came of it, how far it is, that it
was given up."""
