"""Checkpoints of other projects to this package's layout: LlamaGen and taming tokenizers, official XDLM networks."""
