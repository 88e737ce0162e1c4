"""Images and code caches: real pixels, their batches and classes, and what a tokenizer made of them (`code_cache`)."""
