"""How well the features of every block are suited for reconstruction: a light MAE decoder on each of them (Fig. 6).

The encoder is frozen and sees a quarter of the patches, once per batch; a decoder per block learns to paint the rest
from that block's tokens (Appendix C.2). All decoders start from the same weights and see the same crops and masks, so
only the blocks make a difference. A decoder reads the raw output of its block, as k-NN does; that of a last block with
a final norm reads the normed tokens, as the decoder it was pre-trained with did.

Shapes: B images, N patches, K visible patches, D encoder width, C pixel values of a patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages
from mimref.data.loader import ViewBatch, check_batch_size, crop_batches, view_batches
from mimref.data.photometric import Photometric
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from mimref.devices import autocast
from mimref.draws import Operation, uniform
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.masking import (
    MAEDecoder,
    Mask,
    count_visible,
    draw_mask,
    hidden_error,
    init_linear,
    normalize_patches,
    patchify,
    visible_tokens,
)
from mimref.encoders.vit import Architecture, Encoder, check_blocks
from mimref.errors import ConfigError, DataError, DivergenceError
from mimref.evaluation.blocks.config import ReconstructionConfig
from mimref.evaluation.blocks.statistics import delta_rows, normalised_deltas
from mimref.progress import Progress
from mimref.results import Row
from mimref.training.optim import adamw, learning_rate, module_groups, set_learning_rate

# MAE's.
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """What training a decoder on every block found."""

    rows: list[Row]
    bad: list[tuple[str, str]]
    """Path and reason of every image left out."""
    decoders: list[MAEDecoder]
    """One per block, trained, in evaluation mode."""


def reconstruct_blocks(
    encoder: Encoder | TimmBackbone,
    train: ImageSource,
    val: ImageSource,
    transform: EvalTransform,
    settings: ReconstructionConfig | None = None,
    *,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
    max_bad: int = 100,
    progress: Progress | None = None,
) -> Reconstruction:
    """Train a decoder on every block of a frozen encoder, and measure each on the validation images (Appendix C.2).

    No labels are needed. The encoder is used as it is (move it to `device` first), in evaluation mode, and not changed.
    blocks: 1-based, ascending; None is all. Rows, each with `block` and `epochs`: `block_reconstruction`, the mean
    squared error of normalised pixels of hidden patches (lower is better), where every validation image has a mask of
    its own that depends on seed and image alone; and `block_reconstruction_delta`, what a block improves over the one
    before, see `normalised_deltas`. progress: updates, then batches of validation images.
    Raises ConfigError for an encoder without patch tokens or settings that do not fit, DataError for images that cannot
    be read, DivergenceError when a loss is not finite.
    """
    settings = settings or ReconstructionConfig()
    settings = settings.model_copy(update={"batch_size": min(settings.batch_size, len(train))})
    numbers = list(range(1, encoder.depth + 1)) if blocks is None else list(blocks)
    check_maskable(encoder.architecture, transform.image_size)
    assert isinstance(encoder, Encoder)
    check_blocks(numbers, encoder.depth)
    task = _Task(encoder, transform, settings, numbers, seed=seed, device=device, precision=precision)
    check_batch_size(settings.batch_size, len(train))
    bad = BadImages(max_bad)
    updates = settings.epochs * (len(train) // settings.batch_size)
    total = updates + -(-len(val) // settings.batch_size)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with _frozen(task.encoder):
        _train(task, train, updates, bad, workers, tell)
        losses = _evaluate(task, val, bad, workers, lambda done: tell(updates + done))
    rows: list[Row] = [
        {"metric": "block_reconstruction", "value": loss, "block": block}
        for block, loss in zip(numbers, losses, strict=True)
    ]
    deltas = normalised_deltas(losses, falling_is_better=True)
    rows += delta_rows("block_reconstruction_delta", numbers, deltas)
    return Reconstruction([{**row, "epochs": settings.epochs} for row in rows], bad.items, task.decoders)


class _Task:
    """What training and evaluation share."""

    def __init__(
        self,
        encoder: Encoder,
        transform: EvalTransform,
        settings: ReconstructionConfig,
        blocks: Sequence[int],
        *,
        seed: int,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self.encoder, self.transform, self.settings, self.blocks = encoder, transform, settings, blocks
        self.seed, self.device, self.precision = seed, device, precision
        grid = transform.image_size // encoder.patch_size
        self.num_patches = grid**2
        self.num_visible = count_visible(self.num_patches, settings.mask_ratio)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = MAEDecoder(
                settings.decoder,
                encoder.embed_dim,
                grid,
                3 * encoder.patch_size**2,
                num_prefix=encoder.num_prefix_tokens,
            )
            first.apply(init_linear)
            nn.init.normal_(first.mask_token, std=0.02)
        self.decoders = [deepcopy(first).to(device) for _ in blocks]

    def mask(self, epoch: int, sample_B: Tensor, view: int) -> Mask:
        """A mask per image, a function of seed, epoch, image and view."""
        sample_B = sample_B.to(self.device, non_blocking=True)
        noise = uniform(self.seed, epoch, Operation.MASK, sample_B, view, count=self.num_patches)
        return draw_mask(noise, self.num_visible)

    def losses(self, images: Tensor, mask: Mask) -> Iterator[Tensor]:
        """The loss of each decoder in turn, from one pass of the encoder, whose output carries no gradient."""
        target = normalize_patches(patchify(images, self.encoder.patch_size))
        with torch.no_grad(), autocast(self.device, self.precision):
            tokens = visible_tokens(self.encoder, images, mask.visible_BK, self.blocks, final_norm=True)
        for decoder, tokens_BLD in zip(self.decoders, tokens, strict=True):
            with autocast(self.device, self.precision):
                loss = hidden_error(decoder(tokens_BLD, mask.restore_BN), target, mask.hidden_BN)
            yield loss


def _train(
    task: _Task, source: ImageSource, updates: int, bad: BadImages, workers: int, tell: Callable[[int], None]
) -> None:
    settings, transform = task.settings, task.transform
    groups = [
        group for decoder in task.decoders for group in module_groups(decoder, weight_decay=settings.weight_decay)
    ]
    optimizer = adamw(groups, _BETAS)
    per_epoch = updates // settings.epochs
    # MAE augments by crop and flip alone.
    views = ViewsConfig(color=False, blur=False, flip=settings.flip)
    photometric = Photometric(views, task.seed, task.device, mean=transform.mean, std=transform.std)
    seen = torch.zeros(len(task.blocks), device=task.device)
    for step, batch in enumerate(_crops(task, source, views, workers)):
        for path, reason in batch.bad:
            bad.add(path, reason)
        if len(batch.sample_B):
            set_learning_rate(optimizer, _rate(settings, step, per_epoch))
            images = photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
            for number, loss in enumerate(task.losses(images, task.mask(batch.epoch, batch.sample_B, 0))):
                # One decoder after the other: the gradients are those of the sum, the memory is that of one.
                loss.backward()
                seen[number] += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % per_epoch == 0:
            _check_finite(seen, task.blocks, f"in epoch {batch.epoch + 1}")
        tell(step + 1)


def _crops(task: _Task, source: ImageSource, views: ViewsConfig, workers: int) -> Iterator[ViewBatch]:
    settings = task.settings
    return view_batches(
        source,
        [CropGroup(1, task.transform.image_size, settings.crop_scale, views.aspect_ratio)],
        batch_size=settings.batch_size,
        seed=task.seed,
        epochs=range(settings.epochs),
        workers=workers,
        pin_memory=task.device.type == "cuda",
    )


def _rate(settings: ReconstructionConfig, step: int, per_epoch: int) -> float:
    """Learning rate of an update; MAE's cosine ends at 0."""
    return learning_rate(
        step,
        peak=settings.lr * settings.batch_size / 256,
        warmup_updates=round(settings.warmup_epochs * per_epoch),
        total_updates=settings.epochs * per_epoch,
        end=0.0,
    )


@torch.no_grad()
def _evaluate(
    task: _Task, source: ImageSource, bad: BadImages, workers: int, tell: Callable[[int], None]
) -> list[float]:
    """Loss of every block over all images."""
    for decoder in task.decoders:
        decoder.eval()
    total = torch.zeros(len(task.blocks), dtype=torch.float64)
    count = 0
    batches = crop_batches(source, task.transform, batch_size=task.settings.batch_size, workers=workers)
    for done, batch in enumerate(batches):
        for path, reason in batch.bad:
            bad.add(path, reason)
        if batch.indices:
            images = task.transform.normalize(batch.crops.to(task.device, non_blocking=True))
            # Training has the masks of view 0.
            mask = task.mask(0, torch.tensor(batch.indices), 1)
            # Every image has as many hidden patches, so the mean over images is that over patches.
            total += len(batch.indices) * torch.stack(list(task.losses(images, mask))).double().cpu()
            count += len(batch.indices)
        tell(done + 1)
    if not count:
        raise DataError(f"{source.name}: no readable image")
    _check_finite(total, task.blocks, "on the validation images")
    return [float(loss) for loss in total / count]


@contextmanager
def _frozen(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode, put back at the end."""
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)


def check_maskable(architecture: Architecture | BackboneArchitecture, image_size: int) -> None:
    """Raise ConfigError for an encoder, or for images, of which no patches can be hidden."""
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"{architecture.name} is no plain vision transformer: patches cannot be hidden from it, so there "
            "is no reconstruction loss; leave --reconstruction out"
        )
    architecture.check_size(image_size, "the image size")
    if image_size == architecture.patch_size:
        raise ConfigError(f"images of {image_size} pixels are a single patch, too few to hide any")


def _check_finite(losses_K: Tensor, blocks: Sequence[int], when: str) -> None:
    """Sync point: once per epoch."""
    broken = (~losses_K.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise DivergenceError(
            f"the reconstruction loss of block {blocks[broken[0]]} is not finite {when}; lower the learning rate of "
            "the decoders, use --precision fp32, or check the encoder"
        )
