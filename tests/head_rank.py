"""What the processes of the parallel training test run; apart, so that a fresh process imports little."""

import torch

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss
from xdlm_image.schedulers import XDLMProcess

PROCESS = XDLMProcess(0.1, 20)
IMAGES = 4


def loss_module() -> XDLMLoss:
    torch.manual_seed(1)
    model = XDLMTransformer2DModel(
        sample_size=[2, 3], num_embeds=21, out_channels=20, num_classes=2, num_layers=2, num_attention_heads=2,
        attention_head_dim=4,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return XDLMLoss(model, PROCESS)


def batch(images: slice) -> tuple[torch.Tensor, ...]:
    """z, x, t, class labels of some of the images."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(20, (IMAGES, 6), generator=generator)
    t = torch.linspace(0.2, 0.9, IMAGES)
    z = PROCESS.noise(x, *PROCESS.alpha_beta(t), generator=generator)
    return tuple(value[images] for value in (z, x, t, torch.arange(IMAGES) % 3))


def train_on_rank(rank: int, folder: str, kind: str) -> None:
    """Gradients of half of the images under DDP, or FSDP of all or of the network alone; rank 0 writes them, whole."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
    module = loss_module()
    if kind == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for block in module.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh)
        run = fully_shard(module, mesh=mesh) if kind == "fsdp" else module
        if kind == "fsdp of the network":
            fully_shard(module.transformer, mesh=mesh, reshard_after_forward=True)
    half = IMAGES // 2
    run(*batch(slice(rank * half, (rank + 1) * half))).mean.backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if rank == 0:
        torch.save(gradients, f"{folder}/{kind}.pt")
    torch.distributed.destroy_process_group()
