"""Where Triton's kernel stands in for torch in the reverse step. The travelling files know nothing of it."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from . import row_draw


def register() -> None:
    """Let CUDA's rows be drawn by the kernel, if Triton is installed; whether it runs shows at the first draw."""
    if importlib.util.find_spec("triton") is not None:
        row_draw.FAST["cuda"] = _first_draw


def _first_draw(*arguments: Any) -> row_draw.Drawn:
    """Draw one row by the kernel to see that it runs; from then on it does, or torch does."""
    device = arguments[0].device
    try:
        from . import row_draw_triton

        code = torch.zeros(1, dtype=torch.int64, device=device)
        half = torch.full((1,), 0.5, dtype=torch.float64, device=device)
        row_draw_triton.draw_rows(torch.zeros(1, 2, device=device), code == 0, code, half)[0].item()  # waits for it
        row_draw.FAST[device.type] = row_draw_triton.draw_rows
    except Exception as error:  # a missing compiler, an old GPU: whatever it is, torch does without
        warnings.warn(f"Triton cannot run here ({error}); sampling takes its slower path in torch", stacklevel=2)
        del row_draw.FAST[device.type]
    return row_draw.draw_rows(*arguments)
