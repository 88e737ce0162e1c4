"""Pipelines: labels in, images out; or pictures and labels in, and masks."""

# diffusers finds the parts of a saved pipeline only among modules that have been imported
from xdlm_image import models as _models
from xdlm_image import schedulers as _schedulers

from .pipeline_xdlm import XDLMPipeline
from .pipeline_xdlm_img2img import XDLMImg2ImgPipeline
from .pipeline_xdlm_inpaint import XDLMInpaintPipeline

__all__ = ["XDLMImg2ImgPipeline", "XDLMInpaintPipeline", "XDLMPipeline"]
del _models, _schedulers
