"""What a training step exchanges with the CPU: two stand-ins for a GPU, since nothing waits for a CPU.

`watching` runs a step on the CPU with its values: weights, queue and all that `Tensor.to(device)` returns count as on
the device, and so does all that is computed from them. Augmentations are drawn on the CPU on purpose; the draws count
as on the device only once the code sends them there.

`distant` runs a step on the meta device, whose values torch itself refuses to read: it raises for `item`, `nonzero`,
masks as indices and copies to the CPU. What the step copies to the device and what it makes on the CPU is recorded,
with the function that did it.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimref.distributed.sharding import local
from mimref.refinement.stages import EncoderStage, RefinementStage
from mimref.training.ema import WeightAverage

ROOT = Path(__file__).parents[1] / "mimref"

# Operations for which the CPU has to know the result or its shape.
WAITING = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), int()
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# These read a CPU tensor without an operation that a dispatch mode would see.
READING = ("tolist", "numpy", "cpu")


class Watch(TorchDispatchMode):
    """Records every operation that would wait for the device."""

    def __init__(self, on_device: list[Tensor]) -> None:
        super().__init__()
        # Storages are kept, so that no later one has the same address.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.syncs: list[str] = []
        for tensor in on_device:
            self.mark(tensor)

    def mark(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        self.storages[storage._cdata] = storage

    def holds(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and local(tensor).untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if any(self.holds(leaf) for leaf in leaves):
            name = func._schema.name
            masks = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)]
            # All tensors after the first are indices.
            by_mask = name in INDEXING and any(leaf is not args[0] for leaf in masks)
            if name in WAITING or by_mask:
                self.syncs.append(name)
            # FSDP's gathers write into tensors that are passed to them.
            written = [given for given, at in zip(args, func._schema.arguments, strict=False) if at.is_write]
            named = [(kwargs or {}).get(at.name) for at in func._schema.arguments if at.is_write]
            for leaf in tree_leaves((result, written, named)):
                if isinstance(leaf, Tensor):
                    self.mark(leaf)
        return result


@contextmanager
def watched(job: RefinementStage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    run = job.method
    modules = [run.encoder, run.heads]
    if isinstance(job, EncoderStage) and isinstance(job.average, WeightAverage):
        modules.append(job.average.module)
    with watching(modules, (run.queue, run, run.photometric, job.loss_guard), monkeypatch) as watch:
        yield watch


@contextmanager
def watching(modules: list[nn.Module], parts: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Record what waits for a device that holds these modules and the tensors of these objects."""
    there = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for part in parts:
        there += [value for value in vars(part).values() if isinstance(value, Tensor)]
    watch = Watch(there)
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = move(self, *args, **kwargs)
        if any(isinstance(argument, torch.device) for argument in (*args, *kwargs.values())):
            if not watch.holds(self):
                # The CPU waits for a copy unless the copy is declared non-blocking.
                watch.syncs += [] if kwargs.get("non_blocking") else ["to"]
                moved = self.clone() if moved is self else moved
            watch.mark(moved)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", to)
        for name in READING:
            patch.setattr(Tensor, name, noted(watch, name))
        with watch:
            yield watch


def noted(watch: Watch, name: str) -> Any:
    read = getattr(Tensor, name)

    def reads(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if watch.holds(self):
            watch.syncs.append(name)
        return read(self, *args, **kwargs)

    return reads


# --- the meta device

META = torch.device("meta")
COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}


class Distant(TorchDispatchMode):
    """Counts what passes between CPU and meta device, and tensors made on the CPU, by the function that did it."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[str] = Counter()
        """Copies to the device; those that also wait are in `waited`, too."""
        self.waited: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        """Operations on the device that also take tensors of the CPU: implicit copies."""
        self.made: Counter[str] = Counter()
        """Tensors made on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_cpu = [tensor for tensor in given if not tensor.is_meta]
        if (
            func._schema.name in ("aten::_to_copy", "aten::copy_", "aten::to")
            and on_cpu
            and any(x.is_meta for x in returned)
        ):
            self.copied[caller()] += 1
            if not (kwargs or {}).get("non_blocking"):
                self.waited[caller()] += 1
        elif on_cpu and len(on_cpu) < len(given):
            self.mixed[f"{func._schema.name} in {caller()}"] += 1
        elif any(not x.is_meta and not any(x is y or x._is_view() for y in given) for x in returned):
            self.made[caller()] += 1
        return result


class _Literals(TorchFunctionMode):
    """Counts tensors made from Python's numbers on the device: they are made on the CPU and copied from there."""

    def __init__(self, distant: Distant) -> None:
        super().__init__()
        self.distant = distant

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            self.distant.waited[caller()] += 1
        return result


def caller() -> str:
    """Return file and function of the package that is running, `torch.optim` if the optimizer is, or `?`."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/optim/" in name:
            return "torch.optim"
        if name.startswith(str(ROOT)):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_code.co_qualname.rpartition('.')[2]}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextmanager
def distant() -> Iterator[Distant]:
    """Record what a step on the meta device does that it should not; torch itself raises for reads of values."""
    noted = Distant()
    with _Literals(noted), noted:
        yield noted
