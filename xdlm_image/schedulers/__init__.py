"""The noise process and the inference schedulers on it."""

from .kernels import register
from .process_xdlm import MixtureWeights, XDLMProcess
from .scheduling_xdlm import XDLMScheduler, XDLMSchedulerOutput
from .scheduling_xdlm_ordered import XDLMOrderedScheduler
from .scheduling_xdlm_psi import XDLMPsiScheduler

register()

__all__ = [
    "MixtureWeights",
    "XDLMOrderedScheduler",
    "XDLMProcess",
    "XDLMPsiScheduler",
    "XDLMScheduler",
    "XDLMSchedulerOutput",
]
