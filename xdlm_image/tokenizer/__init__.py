"""Training and using the VQ tokenizer, diffusers' `VQModel`: `train`, `encode`, `codes`, `codebook`, `measure`."""
