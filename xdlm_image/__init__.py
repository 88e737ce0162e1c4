"""Class-conditional image generation in few steps by discrete diffusion (XDLM, arXiv 2602.01362) on VQ codes.

The names below are imported when they are first used, so that `import xdlm_image` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdlm_image.models import XDLMTransformer2DModel
    from xdlm_image.pipelines import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMPipeline
    from xdlm_image.schedulers import XDLMOrderedScheduler, XDLMProcess, XDLMPsiScheduler, XDLMScheduler

    __version__: str

_HOMES = {
    "XDLMImg2ImgPipeline": "xdlm_image.pipelines",
    "XDLMInpaintPipeline": "xdlm_image.pipelines",
    "XDLMOrderedScheduler": "xdlm_image.schedulers",
    "XDLMPipeline": "xdlm_image.pipelines",
    "XDLMProcess": "xdlm_image.schedulers",
    "XDLMPsiScheduler": "xdlm_image.schedulers",
    "XDLMScheduler": "xdlm_image.schedulers",
    "XDLMTransformer2DModel": "xdlm_image.models",
}

__all__ = [
    "XDLMImg2ImgPipeline",
    "XDLMInpaintPipeline",
    "XDLMOrderedScheduler",
    "XDLMPipeline",
    "XDLMProcess",
    "XDLMPsiScheduler",
    "XDLMScheduler",
    "XDLMTransformer2DModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("xdlm-image")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
