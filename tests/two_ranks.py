"""What the processes of tests with two ranks run; apart, so that a fresh process imports little."""

import json
from pathlib import Path

import numpy as np
import torch

from xdlm_image.features.statistics import StreamedStatistics


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


def manifolds_on_rank(rank, folder):
    """Two ranks take 23 images in blocks of 3 in turn, gather them, compare them with 17, and write what each has."""
    from xdlm_image.data.image_batches import blocks_of_rank
    from xdlm_image.evaluation import feature_metrics
    from xdlm_image.features.feature_set import FeatureCollector

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ours, theirs = features(23, 4).float(), features(17, 4, seed=1).float()
    collector = FeatureCollector(23)
    for block in blocks_of_rank(23, 3):
        collector.update(block.start, ours[block.start : block.stop], torch.tensor(block))
    gathered = collector.gather()
    cdist, rows = torch.cdist, []
    torch.cdist = lambda a, b: rows.append(len(a)) or cdist(a, b)
    feature_metrics.ROWS = 5
    found = {"metrics": feature_metrics.manifold_metrics(gathered.features, theirs), "rows": rows}
    found |= {"features": gathered.features.tolist(), "labels": gathered.labels.tolist()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
