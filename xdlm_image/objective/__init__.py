"""The XDLM objective: `xdlm_nelbo` and `XDLMLoss` for training, the dense reference for checks."""

from .module import XDLMLoss
from .nelbo import xdlm_nelbo
from .reference import discrete_kl, posterior, reference_nelbo

__all__ = ["XDLMLoss", "discrete_kl", "posterior", "reference_nelbo", "xdlm_nelbo"]
