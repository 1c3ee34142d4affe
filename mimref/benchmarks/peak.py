"""The memory that a step takes at its peak on a CUDA device, found without one: the step itself, run on fake tensors.

Fake tensors have shapes and types, and no data. A step of them takes seconds whatever the batch, and every tensor that
it makes is counted while it lives. Arithmetic by hand would have to know what every architecture, precision and way of
recomputing keeps. torch's `MemTracker` counts the same, but runs each module once per step and no frozen weights, where
micro-batches run the encoder many times. The tests compare with it, with real tensors, and with a closed form.

Not counted: the CUDA context, workspaces of cuBLAS and cuDNN, buffers of NCCL, and what the allocator cannot use.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mimref.data.loader import ViewBatch
from mimref.data.views import Photometric, multi_crop
from mimref.encoders.backbones import EncoderArchitecture
from mimref.refinement.alignment import Queue
from mimref.refinement.config import RefineConfig
from mimref.refinement.dense import DenseTerm
from mimref.refinement.memory import check_exact
from mimref.refinement.method import Method
from mimref.refinement.norms import EnsembleRunningNorm
from mimref.refinement.plan import temperatures
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import meta_modules

_DEVICE = torch.device("cpu")
"""Of the fake tensors: those of CUDA have no backward pass on a machine without it."""
_CROPS_HELD = 2
"""Batches of crops on the device: the next one is copied while the current one is in use."""


class StepPeak(NamedTuple):
    """Bytes beside weights, moments, average and queue at the peaks of a step's two parts."""

    whole: int
    """Heads and loss of the whole batch, with the encoder's pass where that is one."""
    parts: int = 0
    """The encoder's second pass, micro-batch by micro-batch; 0 without micro-batches."""

    @property
    def bytes(self) -> int:
        """At the higher one."""
        return max(self)


def step_peak(
    config: RefineConfig,
    architecture: EncoderArchitecture,
    blocks: list[int],
    stage: StageName,
    *,
    images: int,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    gradients_held: bool = False,
) -> StepPeak:
    """Peak of a step of `images` images in one process; its gradients count, unless they are held from step to step.

    gradients_held: they exist before the step, as those of DDP do, and are no part of the result. Raises ConfigError
    for an encoder that cannot be run in micro-batches, or cannot recompute its activations.
    """
    encoder, heads = meta_modules(config, architecture, blocks, stage)
    encoder.train(stage == "encoder")
    dense = stage == "encoder" and config.loss.dense != "none"
    base = meta_modules(config, architecture, blocks, stage)[0].eval().requires_grad_(False) if dense else None
    if micro_batch is not None:
        check_exact(encoder)
    encoder.checkpointing = checkpointing
    fake, counted = FakeTensorMode(allow_non_fake_inputs=True), _Counted()
    with fake:
        for module in (encoder, heads, base):
            if module is not None:
                _materialise(module, counted, gradients=gradients_held)
        generator = torch.Generator()
        queue = Queue(len(blocks), config.heads.queue_size, config.heads.output, generator=generator, device=_DEVICE)
        photometric = _Views(config.views, 0, _DEVICE)
    for tensor in (queue.rows_HQO, queue.sample_Q, queue.update_Q):
        counted.leave_out(tensor)
    method = _Brief(
        encoder,
        heads,
        queue,
        photometric,
        blocks=blocks,
        temperature=temperatures(config.heads.temperature, len(blocks)),
        pool=config.heads.pool,
        loss=config.loss,
        precision=torch.float32 if config.precision == "fp32" else torch.bfloat16,
        micro_batch=micro_batch,
    )
    method.counted = counted
    if base is not None and config.loss.dense != "none":
        method.dense = DenseTerm(base, max(blocks), config.loss.dense)
    top_k = config.encoder_stage.top_k if stage == "encoder" else config.heads_stage.top_k
    with fake, _cuda_arithmetic(), counted:
        groups = multi_crop(config.views, architecture.image_size)
        shapes = [(images, each.count, 3, each.size, each.size) for each in groups]
        held = [[torch.empty(shape, dtype=torch.uint8) for shape in shapes] for _ in range(_CROPS_HELD)]
        batch = ViewBatch(0, torch.arange(images), held[0], [])
        method.forward_backward(batch, torch.ones(len(blocks)), top_k=top_k, train_encoder=stage == "encoder")
    return StepPeak(counted.peak) if method.before is None else StepPeak(method.before, counted.peak)


def _materialise(module: nn.Module, counted: "_Counted", *, gradients: bool) -> None:
    """Fake tensors in place of a module's meta tensors, which do not count."""
    # Norms that have statistics: a step does not begin by looking for them.
    settled = [each for each in module.modules() if isinstance(each, EnsembleRunningNorm)]
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=_DEVICE))
    for norm in settled:
        with torch.utils._mode_utils.no_dispatch():
            norm.updates = torch.ones((), dtype=torch.int64)
    for tensor in (*module.parameters(), *module.buffers()):
        counted.leave_out(tensor)
        if gradients and tensor.requires_grad:
            tensor.grad = torch.empty_like(tensor)
            counted.leave_out(tensor.grad)


class _Counted(TorchDispatchMode):
    """Counts the bytes of all tensors made inside of it while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        # Of each storage torch has one Python object, as long as the storage lives.
        self._storages: Any = WeakIdKeyDictionary()

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this one."""
        self._storages[tensor.untyped_storage()] = True

    def restart(self) -> int:
        """The peak so far; from now on, that of what follows."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._storages:
                self._storages[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def _cuda_arithmetic() -> Iterator[None]:
    """Kernels and types of CUDA in place of the CPU's, where they take other memory: attention, and norms in bf16.

    Functions are replaced, as a mode of torch would not be on where blocks are computed again in the backward pass.
    """

    def exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What autocast computes in single precision on CUDA, and in that of its input on the CPU."""

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    def norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same, without a copy of the input."""
        options = {"dtype": torch.float32} if torch.is_autocast_enabled("cpu") else {}
        return plain_norm(x, *args, **kwargs, **options)

    plain_norm: Callable[..., Tensor] = Tensor.norm
    in_single: list[tuple[object, str]] = [(F, name) for name in ("layer_norm", "group_norm", "softmax")]
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _fused_attention))
        stack.enter_context(patch.object(Tensor, "norm", norm))
        for place, name in [*in_single, (Tensor, "softmax")]:
            stack.enter_context(patch.object(place, name, exact(getattr(place, name))))
        yield


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's attention by the kernel that CUDA chooses: it stores no scores. FlashAttention has no masks, no fp32."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    if attn_mask is None and query.dtype is not torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        found: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return found
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    found = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return found


class _Views(Photometric):
    """Views whose colours nothing changes: what that takes is freed before the encoder begins."""

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        return torch.empty(crops.shape[1], crops.shape[0], *crops.shape[2:])


class _Brief(Method):
    """A step that encodes two of its micro-batches: each of the others takes what the second does."""

    counted: _Counted
    before: int | None = None
    """Peak before the second pass over micro-batches; None without one."""
    _passes = 0

    def _parts(self, batch: ViewBatch) -> Iterator[tuple[slice, ViewBatch]]:
        self._passes += 1
        if self._passes == 2:
            self.before = self.counted.restart()
        return islice(super()._parts(batch), 2)

    def _encode_in_parts(self, batch: ViewBatch) -> list[Tensor]:
        images = len(batch.sample_B)
        parts = [x_VBD.new_empty(len(x_VBD), images, x_VBD.shape[2]) for x_VBD in super()._encode_in_parts(batch)]
        return [torch.empty_like(x_VBD) for x_VBD in parts]  # joined: both exist at once
