"""Pages and sheets of pictures that other parts write: HTML in one file, and PNG."""
