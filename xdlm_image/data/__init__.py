"""Images and code caches: real pixels (`images`, `folders`) and what a tokenizer made of them (`code_cache`)."""
