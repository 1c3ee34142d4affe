"""Reports as single HTML pages that need no network."""
