"""Makes HTML pages and sheets of pictures for the other parts."""
