"""Pipelines: labels in, images out."""

# diffusers finds the parts of a saved pipeline only among modules that have been imported
from xdlm_image import models as _models
from xdlm_image import schedulers as _schedulers

from .pipeline_xdlm import XDLMPipeline

__all__ = ["XDLMPipeline"]
del _models, _schedulers
