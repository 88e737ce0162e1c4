"""The noise process and the inference schedulers on it."""

from .kernels import register
from .process_xdlm import MixtureWeights, XDLMProcess
from .scheduling_xdlm import XDLMScheduler, XDLMSchedulerOutput
from .scheduling_xdlm_ordered import XDLMOrderedScheduler

register()

__all__ = ["MixtureWeights", "XDLMOrderedScheduler", "XDLMProcess", "XDLMScheduler", "XDLMSchedulerOutput"]
