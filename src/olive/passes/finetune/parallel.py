"""Several processes that train one model. Imported only where torch already is.

Every process sees the same steps and takes its share of each one's rows; gradients are summed before the
optimizer's step, so that a document gives the same model on any number of devices. A process is told its
place by torch's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``), set
by ``olive.systems.gang``, by torchrun or by a scheduler.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

_BUCKET = 64 << 20  # bytes of gradients summed at once
_PATIENCE = timedelta(minutes=30)  # that one process may be ahead of another


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together; alone where there is one.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raised it."""
        if self.size == 1:
            return list(flags)
        raised = self.total(torch.tensor(flags, dtype=torch.int32))
        return [bool(value) for value in raised.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process, by rank."""
        if self.size == 1:
            return [value]
        said = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(sizes, torch.tensor([len(said)]))
        most = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(said.ljust(most)), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(found, padded)
        return [json.loads(bytes(text.tolist())) for text in found]

    def told(self, value: Any) -> Any:
        """The first process's JSON value."""
        return self.gather(value if self.first else None)[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over all processes; a missing one counts as zero."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if not parameter.requires_grad or is_sharded(parameter):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                parameter.grad.dtype != bucket[0].dtype
                or sum(x.nbytes for x in bucket) + parameter.grad.nbytes > _BUCKET
            ):
                self._sum(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._sum(bucket)

    def _sum(self, bucket: list[torch.Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        distributed.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


_world = World()


def join(device: str) -> World:
    """Take this process's place among those that its environment tells of; once a process.

    The variables are taken out of the environment: libraries that look for them would wrap the model in
    their own way of training in parallel.

    Args:
        device: ``cpu`` or ``gpu``.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not distributed.is_initialized():
        rank = int(os.environ["RANK"])
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        _world = World(rank, size)
    return _world


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds only a part of ``tensor``."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered from every process where it is sharded; all have to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``value`` in the shards of ``parameter`` where that has some and the shape is the same."""
    if not is_sharded(parameter) or value.shape != parameter.shape or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements)


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Keep a part of every weight in each process (FSDP2, arXiv:2304.11277).

    A layer's weights are gathered when it runs and let go after it; what is in no layer, when the model runs.

    Args:
        model: on its device, the same in every process.
        layers: its decoder layers.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def unshard(model: nn.Module, *, trained_only: bool) -> None:
    """Put whole parameters on the CPU in the place of sharded ones; the model can be saved, not run."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        # they put the sharded parameters back
        for hooks in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            getattr(module, hooks).clear()
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_sharded(parameter) and (parameter.requires_grad or not trained_only):
                if parameter not in made:  # tied weights stay one
                    value = whole(parameter.detach()).cpu()
                    made[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
