"""Images and code caches: real pixels (`images`) and what a tokenizer made of them (`code_cache`)."""
