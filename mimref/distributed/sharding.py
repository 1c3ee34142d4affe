"""Weights, gradients, moments and averages divided among the ranks by torch's FSDP2, one block at a time.

A weight is divided along its first dimension, and a rank's part of it may be empty. FSDP's tensors are recognised by
their methods where importing their class would cost seconds in runs that do not use them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mimref.distributed.collectives import max_over_ranks, sum_over_ranks
from mimref.distributed.group import own_rank, world_size
from mimref.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

M = TypeVar("M", bound=nn.Module)


def check_sharding(device: torch.device) -> None:
    """Raise ConfigError where torch cannot shard: on MPS, or on the CPU if its streams cannot record events."""
    if device.type == "mps" or (device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event")):
        raise ConfigError(
            f"--shard does not work on {device.type} with torch {torch.__version__}; omit it, or use a newer torch"
        )


def device_mesh(device: torch.device) -> "DeviceMesh":
    """Return a one-dimensional mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world_size(),))


class Sharded:
    """A module whose weights are divided among the ranks, and plain copies of it.

    Each forward pass gathers the weights block by block. The backward pass gathers them again and leaves each rank with
    its part of the mean gradient. All ranks must therefore run the same passes, including those without gradient.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, *, method: str = "forward"
    ) -> None:
        """Shard a module in place, block by block, so that the device never holds more than one complete block.

        module: on the CPU or on `device`, with untrained parameters frozen. method: name of the method that runs it.
        """
        from torch.distributed.fsdp import fully_shard

        self.module = module
        self._skeleton = _without_weights(module)
        mesh = device_mesh(device)
        # Nothing here writes into a block's output.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in blocks:
            # Weights keep their dtype and are cast at every use, as without shards, so the results are the same.
            fully_shard(block.to(device), mesh=mesh, reshard_after_forward=True)
        inside = {id(each) for block in blocks for each in block.modules()}
        for each in module.modules():
            if id(each) not in inside:
                each._apply(lambda tensor: tensor.to(device), recurse=False)
        # A root that stays gathered after a pass without gradient would keep its old weights in the next one.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        _gather_in(module, method)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name, without gradient; each rank holds its part."""
        return {name: weight.detach() for name, weight in self.module.named_parameters(remove_duplicate=False)}

    def plain(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        precision: torch.dtype = torch.float32,
        uncast: str = "",
    ) -> nn.Module:
        """Return an ordinary copy in evaluation mode on every rank, with the module's buffers. Call it on all ranks.

        weights: the module's own, or averages of them. precision: used by later passes; the copy is cast as by `lean`,
        except for a child named `uncast`, which is used without autocast.
        """
        return self._copied(weights, device, precision, keep=True, uncast=uncast)

    def plain_on_first(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Gather such a copy on the CPU of rank 0; on other ranks its weights have no values. Call it on all ranks."""
        return self._copied(weights, torch.device("cpu"), torch.float32, keep=own_rank() == 0)

    def _copied(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device,
        precision: torch.dtype,
        *,
        keep: bool,
        uncast: str = "",
    ) -> nn.Module:
        copy = deepcopy(self._skeleton)
        for name, owner, leaf in _places(copy):
            whole = gathered(weights[name])
            if keep:
                is_cast = _is_cast(owner, precision) and name.partition(".")[0] != uncast
                kind = precision if is_cast else whole.dtype
                owner._parameters[leaf] = nn.Parameter(whole.to(device, kind), requires_grad=False)
        for own, current in zip(copy.modules(), self.module.modules(), strict=True):
            for leaf, buffer in current._buffers.items():
                own._buffers[leaf] = None if buffer is None else buffer.detach().to(device, copy=True)
        return copy.eval()


def _without_weights(module: M) -> M:
    """Copy a module without the values of its weights; once FSDP manages a module, it cannot be copied."""
    memo = {id(weight): nn.Parameter(weight.detach().to("meta"), False) for weight in module.parameters()}
    return deepcopy(module, cast(dict[int, Any], memo))


def _places(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return each weight's full name, the module that owns it, and its name in that module."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return [(name, module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]


def _gather_in(module: nn.Module, method: str) -> None:
    """Make a module's method gather the weights outside of blocks, as `forward` does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if method != "forward":
        register_fsdp_forward_method(module, method)
    call = getattr(module, method)

    @wraps(call)
    def with_clean_notes(*args: Any, **options: Any) -> Any:
        found = call(*args, **options)
        if not torch.is_grad_enabled():
            _forget_passes(module)
        return found

    setattr(module, method, with_clean_notes)


def _forget_passes(module: nn.Module) -> None:
    """Clear FSDP's record of a pass's blocks, which FSDP itself clears only after a backward pass."""
    for each in module.modules():
        state = getattr(each, "_get_fsdp_state", lambda: None)()
        group = None if state is None else state._fsdp_param_group
        if group is not None:
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


def lean(module: M, precision: torch.dtype) -> M:
    """Cast in place what autocast to `precision` would cast at every use: the same results in half the memory."""
    for owner in module.modules():
        if _is_cast(owner, precision):
            owner.to(precision)
    return module


def _is_cast(owner: nn.Module, precision: torch.dtype) -> bool:
    return precision is torch.bfloat16 and isinstance(owner, nn.Linear | _ConvNd)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank holds only a part of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; if it is not sharded, all of it."""
    with torch.no_grad():
        return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor.detach()


def gathered(tensor: Tensor) -> Tensor:
    """Return the complete tensor, without gradient. Call this on all ranks if it is sharded."""
    with torch.no_grad():
        return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor.detach()


def like(saved: Any, live: Any) -> Any:
    """Return a saved state, sharded wherever the live one is; this loads states of runs without shards.

    saved, live: nested tables. The saved one may hold entries that the live one lacks. Tensors whose shapes differ are
    returned unchanged, so that loading them raises the error.
    """
    if isinstance(saved, Mapping):
        nested = live if isinstance(live, Mapping) else {}
        return {key: like(value, nested.get(key)) for key, value in saved.items()}
    if not isinstance(saved, Tensor) or not isinstance(live, Tensor) or is_sharded(saved) or not is_sharded(live):
        return saved
    if saved.shape != live.shape:
        return saved
    from torch.distributed.tensor import DTensor

    target, chunks = cast(DTensor, live), saved.chunk(world_size())
    part = chunks[own_rank()] if own_rank() < len(chunks) else saved[:0]
    return DTensor.from_local(
        part.to(local(live).device, live.dtype, copy=True),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=saved.shape,
        stride=live.stride(),
    )


def clip_gradients(weights: Sequence[Tensor], most: float) -> None:
    """Scale the gradients of sharded weights so that their total norm is at most `most`; no sync.

    torch.nn.utils.clip_grad_norm_ gives the same result, but by a chain of operations on FSDP's tensors.
    """
    parts = [local(weight.grad) for weight in weights if weight.grad is not None]
    square = torch.stack(torch._foreach_norm(parts)).square().sum()
    torch._foreach_mul_(parts, (most / (sum_over_ranks(square).sqrt() + 1e-6)).clamp(max=1.0))


def all_finite(weights: Sequence[Tensor]) -> bool:
    """Return whether all weights are finite, on all ranks if they are sharded. Sync point."""
    finite = bool(torch.stack(torch._foreach_norm([local(weight) for weight in weights])).isfinite().all())
    return not max_over_ranks(int(not finite)) if any(map(is_sharded, weights)) else finite


def split(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[tuple[Any, ...], Tensor]]:
    """Split a nested state into the state without sharded tensors, and these tensors by their path of keys."""
    rest: dict[Any, Any] = {}
    sharded: dict[tuple[Any, ...], Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            rest[key], found = split(value)
            sharded |= {(key, *path): tensor for path, tensor in found.items()}
        elif isinstance(value, Tensor) and is_sharded(value):
            sharded[key,] = value
        else:
            rest[key] = value
    return rest, sharded


def joined(rest: dict[Any, Any], sharded: Iterator[tuple[Sequence[Any], Tensor]]) -> dict[Any, Any]:
    """Invert `split`, in place."""
    for path, tensor in sharded:
        table = rest
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = tensor
    return rest
