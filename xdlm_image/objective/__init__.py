"""The XDLM objective: `xdlm_nelbo` for training, the dense reference for checks."""

from .nelbo import xdlm_nelbo
from .reference import discrete_kl, posterior, reference_nelbo

__all__ = ["discrete_kl", "posterior", "reference_nelbo", "xdlm_nelbo"]
