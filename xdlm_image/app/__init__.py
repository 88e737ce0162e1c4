"""The page in the browser: `serving` it, the `page`, and what it has `asked` for."""
