"""The networks: codes in, logits out."""

from .transformer_xdlm import SIZES, XDLMTransformer2DModel, XDLMTransformer2DModelOutput

__all__ = ["SIZES", "XDLMTransformer2DModel", "XDLMTransformer2DModelOutput"]
