"""The noise process and the inference scheduler on it."""

from .process_xdlm import MixtureWeights, XDLMProcess
from .scheduling_xdlm import XDLMScheduler, XDLMSchedulerOutput

__all__ = ["MixtureWeights", "XDLMProcess", "XDLMScheduler", "XDLMSchedulerOutput"]
