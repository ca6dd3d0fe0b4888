"""Names of the files in the studio's own folder."""

REQUEST, RESULT, PROGRESS = "request.json", "result.json", "progress"
"""In the folder of a request to the painter: what is asked for, what came of it, how far it is."""
