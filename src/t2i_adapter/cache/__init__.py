"""Facts about pictures and captions, computed once and kept on disk, keyed by content."""
