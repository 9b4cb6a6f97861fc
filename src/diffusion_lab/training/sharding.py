"""Weights cut over the processes: fully sharded data parallel (Rajbhandari et al. 2020; Zhao et al. 2023), torch's FSDP2.

Each process keeps its part of the live weights, their gradients and the optimiser's moments, and is lent the rest of a block
while that computes. The averages stay whole: they are what is validated, sampled from and judged, by one process or by all.
"""

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def strategy(processes: int) -> ModelParallelStrategy:
    """Lightning's strategy for so many processes; its checkpoints are whole, those of any other run."""
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts the weights over `mesh`, block by block: members of a ModuleList that are called, and what is left as one block."""
    network.to(memory_format=torch.contiguous_format)  # FSDP2 cuts no weights of channels_last
    for module in reversed(list(network.modules())):  # inner blocks first
        for block in module if isinstance(module, nn.ModuleList) else ():
            if type(block).forward is not nn.Module.forward and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has cut this network: every process must call it, and as often."""
    return isinstance(network, FSDPModule)


def whole(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, those that are cut put together; every process must ask."""
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
