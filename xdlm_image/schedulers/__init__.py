"""The noise process and the inference scheduler on it."""

from .kernels import register
from .process_xdlm import MixtureWeights, XDLMProcess
from .scheduling_xdlm import XDLMScheduler, XDLMSchedulerOutput

register()

__all__ = ["MixtureWeights", "XDLMProcess", "XDLMScheduler", "XDLMSchedulerOutput"]
