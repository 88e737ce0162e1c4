"""What the two processes of the all-reduce test run; apart, so that a fresh process imports little."""

import numpy as np
import torch

from xdlm_image.evaluation.statistics import StreamedStatistics


def features(count, dim, seed=0):
    """Correlated features (count, dim) with a mean away from 0, float64."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim))


def reduce_on_rank(rank, folder):
    """Rank 0 sees 6 of 20 vectors, rank 1 the rest; each writes the merged statistics."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    statistics = StreamedStatistics(5)
    statistics.update(features(20, 5)[:6] if rank == 0 else features(20, 5)[6:])
    statistics.all_reduce()
    statistics.save(f"{folder}/{rank}.safetensors", {})
    torch.distributed.destroy_process_group()
