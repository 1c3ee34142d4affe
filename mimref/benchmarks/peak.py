"""Peak memory of a step on a CUDA device, predicted without one by running the step on fake tensors.

Fake tensors have shapes and types but no data. A step on them takes seconds whatever the batch, and every tensor that
it makes is counted while it lives. A formula would have to know what every architecture, precision and kind of
recomputing keeps. torch's `MemTracker` counts the same, but supports only one call of each module per step, where
micro-batches call the encoder many times, and no frozen weights. The tests compare with it, with real tensors, and with
a closed form.

Not counted: the CUDA context, workspaces of cuBLAS and cuDNN, NCCL buffers, and memory that the allocator cannot use.
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

from mimref.benchmarks.stage import crop_type, image_channels
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
"""Device of the fake tensors: fake CUDA tensors have no backward pass on a machine without CUDA."""
_CROPS_HELD = 2
"""Batches of crops on the device: the next one is copied while the current one is in use."""


class StepPeak(NamedTuple):
    """Peak bytes of the two parts of a step, in addition to weights, moments, average and queue."""

    whole: int
    """Heads and loss of the whole batch, with the encoder's pass if there is only one."""
    parts: int = 0
    """The encoder's second pass, micro-batch by micro-batch; 0 without micro-batches."""

    @property
    def bytes(self) -> int:
        """The higher of the two peaks."""
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
    """Predict the peak of a step of `images` images in one process, including gradients unless they are already held.

    gradients_held: gradients exist before the step, as with DDP, and are not part of the result. Raises ConfigError
    for an encoder that cannot run in micro-batches or cannot recompute its activations.
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
        shapes = [(images, each.count, image_channels(config), each.size, each.size) for each in groups]
        held = [[torch.empty(shape, dtype=crop_type(config)) for shape in shapes] for _ in range(_CROPS_HELD)]
        batch = ViewBatch(0, torch.arange(images), held[0], [])
        method.forward_backward(batch, torch.ones(len(blocks)), top_k=top_k, train_encoder=stage == "encoder")
    return StepPeak(counted.peak) if method.before is None else StepPeak(method.before, counted.peak)


def _materialise(module: nn.Module, counted: "_Counted", *, gradients: bool) -> None:
    """Replace a module's meta tensors by fake tensors that are not counted."""
    # Norms are marked as having statistics, so that the step does not begin by collecting them.
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
    """Counts the bytes of all tensors made inside its context while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        # torch keeps one Python object per storage for as long as the storage lives.
        self._storages: Any = WeakIdKeyDictionary()

    def leave_out(self, tensor: Tensor) -> None:
        """Exclude a tensor from the count."""
        self._storages[tensor.untyped_storage()] = True

    def restart(self) -> int:
        """Return the peak so far and start a new one."""
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
    """Use CUDA's kernels and types where their memory differs from the CPU's: attention, and norms in bf16.

    Functions are replaced because a torch mode would not be active when blocks are recomputed in the backward pass.
    """

    def exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a function that autocast runs in single precision on CUDA but in its input's precision on the CPU."""

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    def norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do the same without copying the input."""
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
    """Run attention with the kernel of CUDA, which stores no scores; FlashAttention supports no masks and no fp32."""
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
    """Views without colour changes, whose memory is freed before the encoder starts."""

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        return torch.empty(crops.shape[1], crops.shape[0], *crops.shape[2:])


class _Brief(Method):
    """A step that encodes only two of its micro-batches: each of the others needs what the second does."""

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
