"""One run on several processes, as torchrun starts them: FSDP2, and what they must agree on.

The whole student is one unit of FSDP: its loops call the parts of a layer one by one, so hooks on layers would not be
called. Weights, gradients and optimizer states are sharded between steps; a step gathers the weights once.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from melt_serve.train.session import Paused

Tree = TypeVar("Tree")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=6)
"""How long a process waits where the first reads all files of a teacher and its data, or writes a state. Gloo sees at
once that a process has ended, NCCL only by its own limit of ten minutes."""
waiting_group: dist.ProcessGroup | None = None
"""All processes over gloo: on a GPU, too, they agree and wait without its queue. None for a process alone."""


@contextmanager
def process_group(dtype: torch.dtype) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; give this one's device.

    Args:
        dtype: that is computed in; below float32, FSDP keeps the weights in float32, also for a process alone.
    """
    global waiting_group
    cuda = torch.cuda.is_available()
    backend, device = ("nccl", "cuda") if cuda else ("gloo", "cpu")
    if dist.is_torchelastic_launched():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
        waiting_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    elif dtype != torch.float32:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield torch.device(device, torch.cuda.current_device()) if cuda else torch.device(device)
    finally:
        waiting_group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """Return this process's number; the one with 0 writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model: nn.Module, dtype: torch.dtype) -> None:
    """Shard the weights over the processes; compute in `dtype`, add gradients up in float32."""
    if dist.is_initialized():
        # A warning about in-place operations on the model's answers, of which there are none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        untrained = {weight for weight in model.parameters() if not weight.requires_grad}  # whole, and the teacher's
        fully_shard(model, mp_policy=policy, reshard_after_forward=False, ignored_params=untrained)


def exchange_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass is a step's last: it adds gradients up, and gives gathered weights back."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum the values over all processes, in place, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_of(flags: list[bool]) -> list[bool]:
    """Return each flag as true where it is true in any process; wait for all of them, `PATIENCE` at most."""
    if waiting_group is None:
        return flags
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=waiting_group)
    return values.bool().tolist()


def ending_together(work: Callable[[], Result]) -> Result:
    """Do work of which the first process has most, and return its result once all have done it.

    Raises:
        Exception: what the work raised here.
        Paused: it raised something in another process.
    """
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failed = error
    (others_end,) = any_of([failed is not None])
    if failed is not None:
        raise failed
    if others_end:
        raise Paused
    return result


def full_tensors(tree: Tree, by_all: bool = True) -> Tree:
    """Gather sharded tensors, wherever they are in the tree, as whole ones on the CPU. All processes must call it.

    Args:
        by_all: whether all have them then; or only the first, and the others None in their place.
    """

    def gathered(tensor: DTensor) -> Tensor | None:
        whole = tensor.full_tensor()
        return whole.cpu() if by_all or rank() == 0 else None

    return tree_map_only(DTensor, gathered, tree)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, which every process has, as another one is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict without the weights that are not trained."""
    untrained = {key for key, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {key: value for key, value in model.state_dict().items() if key not in untrained}


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a full `trained_state` into a possibly sharded model."""
    own = model.state_dict()
    untrained = own.keys() - trained_state(model).keys()
    loaded = {key: shard_like(value, own[key]) for key, value in state.items()}
    model.load_state_dict({key: own[key] for key in untrained} | loaded)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a full state dict into the optimizer of a possibly sharded model."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        number: {
            key: shard_like(value, weights[number]) if torch.is_tensor(value) and value.ndim else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
