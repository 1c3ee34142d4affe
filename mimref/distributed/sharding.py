"""Weights, gradients, moments and averages divided among the ranks: torch's FSDP2, one block at a time.

A weight is divided along its first dimension, and a rank's part of it may be empty. Where FSDP's own tensors would cost
an import of seconds in runs without them, they are recognised by what they can do.
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
    """Raise ConfigError where torch cannot shard: on MPS, and on the CPU before its streams could record events."""
    if device.type == "mps" or (device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event")):
        raise ConfigError(
            f"--shard does not work on {device.type} with torch {torch.__version__}; omit it, or use a newer torch"
        )


def device_mesh(device: torch.device) -> "DeviceMesh":
    """All ranks in one row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world_size(),))


class Sharded:
    """A module whose weights are divided among the ranks, and plain copies of it.

    Every pass gathers the weights of one block after the other, and its backward pass does so again and leaves every
    rank its part of the ranks' mean gradient. So all ranks must run the same passes, those without a gradient too.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device, *, method: str = "forward"
    ) -> None:
        """Shard a module in place, block by block, so that the device never holds more than one of them whole.

        module: on the CPU or on `device`, with what does not train frozen. method: by which it is called.
        """
        from torch.distributed.fsdp import fully_shard

        self.module = module
        self._skeleton = _without_weights(module)
        mesh = device_mesh(device)
        # Nothing here writes into what a block returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in blocks:
            # Weights stay as they are and are cast in every use, as without shards: the results are the same.
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
        """By name, without gradient; every rank holds its part."""
        return {name: weight.detach() for name, weight in self.module.named_parameters(remove_duplicate=False)}

    def plain(
        self, weights: Mapping[str, Tensor], device: torch.device, *, precision: torch.dtype = torch.float32
    ) -> nn.Module:
        """An ordinary copy in evaluation mode, on every rank, with the module's buffers. Call it on all ranks.

        weights: those of the module, or averages of them. precision: of the passes to come; the copy is `lean`.
        """
        return self._copied(weights, device, precision, keep=True)

    def plain_on_first(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The same on the CPU of rank 0, weight by weight; on the other ranks, without values. Call it on all ranks."""
        return self._copied(weights, torch.device("cpu"), torch.float32, keep=own_rank() == 0)

    def _copied(
        self, weights: Mapping[str, Tensor], device: torch.device, precision: torch.dtype, *, keep: bool
    ) -> nn.Module:
        copy = deepcopy(self._skeleton)
        for name, owner, leaf in _places(copy):
            whole = gathered(weights[name])
            if keep:
                kind = precision if _is_cast(owner, precision) else whole.dtype
                owner._parameters[leaf] = nn.Parameter(whole.to(device, kind), requires_grad=False)
        for own, current in zip(copy.modules(), self.module.modules(), strict=True):
            for leaf, buffer in current._buffers.items():
                own._buffers[leaf] = None if buffer is None else buffer.detach().to(device, copy=True)
        return copy.eval()


def _without_weights(module: M) -> M:
    """A copy of a module whose weights have no values, which FSDP itself does not allow later."""
    memo = {id(weight): nn.Parameter(weight.detach().to("meta"), False) for weight in module.parameters()}
    return deepcopy(module, cast(dict[int, Any], memo))


def _places(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, owner, and name in it, of every weight."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return [(name, module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]


def _gather_in(module: nn.Module, method: str) -> None:
    """Let a module's method gather what no block holds, as `forward` does."""
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
    """FSDP notes the blocks of every pass for its backward pass, and clears the notes after it; here none follows."""
    for each in module.modules():
        state = getattr(each, "_get_fsdp_state", lambda: None)()
        group = None if state is None else state._fsdp_param_group
        if group is not None:
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


def lean(module: M, precision: torch.dtype) -> M:
    """Cast, in place, what autocast to `precision` casts in every use: the results are the same in half the memory."""
    for owner in module.modules():
        if _is_cast(owner, precision):
            owner.to(precision)
    return module


def _is_cast(owner: nn.Module, precision: torch.dtype) -> bool:
    return precision is torch.bfloat16 and isinstance(owner, nn.Linear | _ConvNd)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank holds only a part."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares its memory; of a tensor that is not sharded, all of it."""
    with torch.no_grad():
        return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor.detach()


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, without gradient; of a sharded one, call it on all ranks."""
    with torch.no_grad():
        return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor.detach()


def like(saved: Any, live: Any) -> Any:
    """What was saved, sharded wherever the tensor in its place is: to load states of runs without shards.

    saved, live: nested tables; saved ones may hold what the live ones lack, and tensors of other shapes stay as they
    are, for who loads them to complain of.
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
    """Scale the gradients of sharded weights so that the norm of all of them together is at most `most`; no sync.

    torch.nn.utils.clip_grad_norm_ gives the same by a chain of operations on FSDP's tensors.
    """
    parts = [local(weight.grad) for weight in weights if weight.grad is not None]
    square = torch.stack(torch._foreach_norm(parts)).square().sum()
    torch._foreach_mul_(parts, (most / (sum_over_ranks(square).sqrt() + 1e-6)).clamp(max=1.0))


def all_finite(weights: Sequence[Tensor]) -> bool:
    """Whether weights hold numbers alone; of sharded ones, on all ranks. Sync point."""
    finite = bool(torch.stack(torch._foreach_norm([local(weight) for weight in weights])).isfinite().all())
    return not max_over_ranks(int(not finite)) if any(map(is_sharded, weights)) else finite


def split(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[tuple[Any, ...], Tensor]]:
    """A nested state without its sharded tensors, and these by the keys that lead to them."""
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
    """The inverse of `split`, in place."""
    for path, tensor in sharded:
        table = rest
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = tensor
    return rest
