"""The XDLM objective: `xdlm_nelbo`, `xdlm_head_nelbo` and `XDLMLoss` for training, the dense reference for checks."""

from xdlm_image.objective.head import XDLMLossOutput, xdlm_head_nelbo
from xdlm_image.objective.module import XDLMLoss
from xdlm_image.objective.nelbo import xdlm_nelbo
from xdlm_image.objective.reference import discrete_kl, posterior, reference_nelbo

__all__ = [
    "XDLMLoss",
    "XDLMLossOutput",
    "discrete_kl",
    "posterior",
    "reference_nelbo",
    "xdlm_head_nelbo",
    "xdlm_nelbo",
]
