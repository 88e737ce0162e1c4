"""Settings for every test: two threads, and hypothesis examples that are the same in every run."""

import hypothesis
import torch

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")
torch.set_num_threads(min(2, torch.get_num_threads()))
