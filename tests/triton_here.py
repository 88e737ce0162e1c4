"""Whether Triton's kernels can be tried here: on a GPU, else in its interpreter, which not every numpy suits."""

import importlib.util

import pytest
import torch


def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here"
    if torch.cuda.is_available():
        return None
    import triton
    import triton.language as tl

    @triton.jit
    def count(out, end):
        steps = 0
        for _ in range(end):
            steps += 1
        tl.store(out, steps)

    try:
        count[(1,)](steps := torch.zeros(1, dtype=torch.int32), 3)
    except Exception as error:  # whatever it is, here it cannot be tried
        return f"Triton's interpreter does not run here: {error}"
    assert steps.item() == 3
    return None


PROBLEM = _problem()
needs_triton = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
