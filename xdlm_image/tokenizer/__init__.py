"""The VQ tokenizer, diffusers' `VQModel`: `train` and `losses`, `encode`, `codes`, `codebook`, `measure`."""
