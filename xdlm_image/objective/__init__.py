"""The XDLM objective: `xdlm_nelbo`, `xdlm_head_nelbo` and `XDLMLoss` for training, the dense reference for checks."""

from .head import XDLMLossOutput, xdlm_head_nelbo
from .module import XDLMLoss
from .nelbo import xdlm_nelbo
from .reference import discrete_kl, posterior, reference_nelbo

__all__ = [
    "XDLMLoss",
    "XDLMLossOutput",
    "discrete_kl",
    "posterior",
    "reference_nelbo",
    "xdlm_head_nelbo",
    "xdlm_nelbo",
]
