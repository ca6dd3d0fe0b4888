"""Where samples come from: folders, the hub, shards, and generators of the project."""
