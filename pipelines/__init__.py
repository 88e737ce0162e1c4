"""Pipelines: labels in, images out."""

from .pipeline_xdlm import XDLMPipeline

__all__ = ["XDLMPipeline"]
