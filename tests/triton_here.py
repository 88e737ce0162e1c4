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
    except Exception as error:
        if "0-dimensional arrays" not in str(error):
            raise
        return f"the interpreter of Triton {triton.__version__} cannot use this numpy, an older one would do: {error}"
    assert steps.item() == 3
    return None


PROBLEM = _problem()
needs_triton = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
kernel = (pytest.mark.kernel, needs_triton)  # of a parameter whose tests run Triton's kernels, on a GPU if there is one
