"""Fully sharded data parallel (Rajbhandari et al. 2020; Zhao et al. 2023) by torch's FSDP2.

Each process keeps a shard of the raw weights, their gradients and the optimizer's moments, and gathers a block's weights while
the block computes. The averages are not sharded, since validation and sampling use them.
"""

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def strategy(processes: int) -> ModelParallelStrategy:
    """Return Lightning's strategy for a number of processes. Its checkpoints are not sharded, so any run can load them."""
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights over `mesh` by blocks: the members of each ModuleList that have a forward, then the rest.

    The network becomes contiguous first: FSDP2 does not shard channels_last weights.
    """
    network.to(memory_format=torch.contiguous_format)
    for module in reversed(list(network.modules())):  # inner blocks first
        for block in module if isinstance(module, nn.ModuleList) else ():
            if type(block).forward is not nn.Module.forward and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was applied. All processes must call a sharded network the same number of times."""
    return isinstance(network, FSDPModule)


def whole(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with shards gathered. Every process must call it."""
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
