"""Settings for every test: one thread (tiny tensors on busy cores), and the same hypothesis examples in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; subprocesses inherit it

import hypothesis  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")
torch.set_num_threads(1)
