"""Suitability of each block's features for reconstruction: a light MAE decoder on every block (Fig. 6).

The encoder is frozen and sees a quarter of the patches, once per batch. A decoder per block learns to reconstruct the
rest from that block's tokens (Appendix C.2). All decoders start from the same weights and see the same crops and masks,
so that only the blocks differ. A decoder reads its block's raw output, also that of the last block, through a LayerNorm
of its own: tokens grow from block to block, and without it the losses would reflect their size, not their content.

Shapes: B images, N patches, K visible patches, D encoder width, C pixel values of a patch.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimref.config.run import OptimizerConfig, ViewsConfig
from mimref.data.decode import BadImages, none_readable
from mimref.data.loader import ViewBatch, check_batch_size, crop_batches, loader_workers, view_batches
from mimref.data.sources import ImageSource
from mimref.data.views import CropGroup, Photometric
from mimref.devices import autocast, choose_attention
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
)
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError, DivergenceError
from mimref.evaluation.blocks.config import ReconstructionConfig
from mimref.evaluation.blocks.statistics import delta_rows
from mimref.features.encode import PassSettings
from mimref.progress import Progress, ProgressOnly
from mimref.results import Row
from mimref.training.job import GradientJob
from mimref.training.job import train as run_job
from mimref.training.optim import module_groups, warmup_cosine, warmup_updates

# Updates per epoch below which a note is given.
FEWEST_UPDATES = 10


@dataclass(frozen=True)
class Reconstruction:
    """The result of a decoder on every block."""

    rows: list[Row]
    bad: list[tuple[str, str]]
    """Path and reason of every image left out."""
    decoders: list[MAEDecoder]
    """One per block, trained, in evaluation mode."""


def reconstruct_blocks(
    encoder: Encoder | TimmBackbone,
    train: ImageSource,
    val: ImageSource,
    reading: PassSettings,
    settings: ReconstructionConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reconstruction:
    """Train a decoder on every block of a frozen encoder, and measure each on the validation images (Appendix C.2).

    Needs no labels. The encoder (move it to the device first) is put into evaluation mode, and does not change. Rows,
    each with `block` and `epochs`: `block_reconstruction`, the mean squared error of normalised pixels of hidden
    patches (lower is better), where every validation image has its own mask, a function of seed and image; and
    `block_reconstruction_delta`, the improvement over the previous block, see `normalised_deltas`. progress: counts
    updates, then batches of validation images.
    Raises ConfigError for an encoder without patch tokens or settings that do not fit, DataError for images that cannot
    be read, DivergenceError when a loss is not finite.
    """
    settings = settings.model_copy(update={"batch_size": min(settings.batch_size, len(train))})
    check_maskable(encoder.architecture, reading.transform.image_size)
    assert isinstance(encoder, Encoder)
    check_batch_size(settings.batch_size, len(train))
    encoder.eval()
    blocks = range(1, encoder.depth + 1)
    job = DecodersJob(encoder, reading, settings, blocks, seed, len(train), train.channels)
    total = job.total + -(-len(val) // job.images_per_pass)
    run_job(job, job.batches(train), ProgressOnly(progress, total))
    losses = job.evaluate(val, lambda done: progress(job.total + done, total) if progress else None)
    rows: list[Row] = [
        {"metric": "block_reconstruction", "value": loss, "block": block}
        for block, loss in zip(blocks, losses, strict=True)
    ]
    rows += delta_rows("block_reconstruction_delta", blocks, losses, falling_is_better=True)
    return Reconstruction([{**row, "epochs": settings.epochs} for row in rows], job.bad.items, job.decoders)


class DecodersJob(GradientJob):
    """Trains a decoder per block of a frozen encoder."""

    def __init__(
        self,
        encoder: Encoder,
        reading: PassSettings,
        settings: ReconstructionConfig,
        blocks: Sequence[int],
        seed: int,
        images: int,
        channels: int = 3,
    ) -> None:
        """images: number of training images. channels: channels of each image."""
        self.encoder, self.reading, self.settings, self.blocks, self.seed = encoder, reading, settings, blocks, seed
        self.bad = BadImages(reading.max_bad)
        self.images_per_pass = min(settings.batch_size, settings.micro_batch)
        # MAE augments by crop and flip only.
        self.views = ViewsConfig(color=False, blur=False, flip=settings.flip)
        mean, std = reading.transform.mean, reading.transform.std
        self.photometric = Photometric(self.views, seed, reading.device, mean=mean, std=std)
        self.decoders = self._build_decoders(channels)
        per_epoch = images // settings.batch_size
        decay = settings.weight_decay
        super().__init__(
            "decoders",
            [group for decoder in self.decoders for group in module_groups(decoder, weight_decay=decay)],
            warmup_cosine(
                peak=settings.lr * settings.batch_size / 256,
                warmup_updates=warmup_updates(settings.warmup_epochs, settings.epochs, per_epoch),
                total_updates=settings.epochs * per_epoch,
                end=0.0,  # as in MAE
            ),
            OptimizerConfig(betas=(0.9, 0.95)),  # MAE's
            epochs=settings.epochs,
            steps_per_epoch=per_epoch,
            device=reading.device,
        )
        self.seen = torch.zeros(len(blocks), device=reading.device)

    def _build_decoders(self, channels: int) -> list[MAEDecoder]:
        """Return one decoder per block, all with the same weights."""
        encoder, grid = self.encoder, self.reading.transform.image_size // self.encoder.patch_size
        self.num_patches = grid**2
        self.num_visible = count_visible(self.num_patches, self.settings.mask_ratio)
        pixels, prefix = channels * encoder.patch_size**2, encoder.num_prefix_tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            first = MAEDecoder(
                self.settings.decoder, encoder.embed_dim, grid, pixels, num_prefix=prefix, norm_input=True
            )
            first.apply(init_linear)
            nn.init.normal_(first.mask_token, std=0.02)
        choose_attention(first, self.reading.device, self.reading.precision)
        return [deepcopy(first).to(self.reading.device) for _ in self.blocks]

    def batches(self, source: ImageSource) -> Iterator[ViewBatch]:
        """Return batches of random crops of the training images."""
        size = self.reading.transform.image_size
        return view_batches(
            source,
            [CropGroup(1, size, self.settings.crop_scale, self.views.aspect_ratio)],
            batch_size=self.settings.batch_size,
            seed=self.seed,
            epochs=range(self.settings.epochs),
            workers=loader_workers(self.reading.workers, source),
            pin_memory=self.device.type == "cuda",
            decode_on=self.reading.decode_on,
        )

    def skip(self, images: Sequence[tuple[str, str]]) -> None:
        self.bad.add_all(images)

    def forward_backward(self, batch: ViewBatch, images: int) -> Tensor:
        """Return the sum of the decoders' losses on a batch; gradients are accumulated pass by pass."""
        count, most = len(batch.sample_B), self.images_per_pass
        for start in range(0, count, most):
            sample_B = batch.sample_B[start : start + most]
            views = self.photometric(batch.crops[0][start : start + most], batch.epoch, sample_B, [0])[0]
            # All images have equally many hidden patches, so the mean over images is that over patches.
            share = len(sample_B) / count
            for number, loss in enumerate(self._losses(views, self._mask(batch.epoch, sample_B, 0))):
                # Decoder by decoder: this yields the gradients of the sum, with the memory of one.
                (share * loss).backward()
                self.seen[number] += share * loss.detach()
        return self.seen.sum()

    def check(self) -> None:
        self._check_finite(self.seen, f"in epoch {-(-self.step // self.steps_per_epoch)}")

    def _mask(self, epoch: int, sample_B: Tensor, view: int) -> Mask:
        """Draw a mask per image, a function of seed, epoch, image and view."""
        sample_B = sample_B.to(self.device, non_blocking=True)
        noise = uniform(self.seed, epoch, Operation.MASK, sample_B, view, count=self.num_patches)
        return draw_mask(noise, self.num_visible)

    def _losses(self, images: Tensor, mask: Mask) -> Iterator[Tensor]:
        """Yield the loss of each decoder in turn, from one encoder pass without gradient."""
        target = normalize_patches(patchify(images, self.encoder.patch_size))
        with torch.no_grad(), autocast(self.device, self.reading.precision):
            tokens = self.encoder.blocks(images, self.blocks, visible_BK=mask.visible_BK)
        for decoder, tokens_BLD in zip(self.decoders, tokens, strict=True):
            with autocast(self.device, self.reading.precision):
                loss = hidden_error(decoder(tokens_BLD, mask.restore_BN), target, mask.hidden_BN)
            yield loss

    @torch.no_grad()
    def evaluate(self, source: ImageSource, report: Callable[[int], None]) -> list[float]:
        """Return the loss of every block over all images. report: receives the number of batches done."""
        for decoder in self.decoders:
            decoder.eval()
        total, count = torch.zeros(len(self.blocks), dtype=torch.float64), 0
        transform, workers = self.reading.transform, loader_workers(self.reading.workers, source)
        batches = crop_batches(
            source, transform, batch_size=self.images_per_pass, workers=workers, decode_on=self.reading.decode_on
        )
        for done, batch in enumerate(batches, 1):
            self.skip(batch.bad)
            if batch.indices:
                images = transform.normalize(batch.crops.to(self.device, non_blocking=True))
                # Training uses the masks of view 0.
                mask = self._mask(0, torch.tensor(batch.indices), 1)
                total += len(batch.indices) * torch.stack(list(self._losses(images, mask))).double().cpu()
                count += len(batch.indices)
            report(done)
        if not count:
            raise none_readable(source.name, self.bad.items)
        self._check_finite(total, "on the validation images")
        return [float(loss) for loss in total / count]

    def _check_finite(self, losses_K: Tensor, when: str) -> None:
        """Raise DivergenceError if a loss is not finite. This is a sync point, once per epoch."""
        broken = (~losses_K.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise DivergenceError(
                f"the reconstruction loss of block {self.blocks[broken[0]]} is not finite {when}; lower "
                "reconstruction.lr, use --precision fp32, or check the encoder"
            )


def few_updates(settings: ReconstructionConfig, images: int) -> str | None:
    """Return one line of advice if decoders learn little because a batch holds a large part of the training images."""
    per_epoch = max(1, images // settings.batch_size)
    if per_epoch >= FEWEST_UPDATES:
        return None
    return (
        f"the decoders get {per_epoch * settings.epochs} updates in {settings.epochs} epochs, since "
        f"reconstruction.batch_size is {settings.batch_size} and there are {images} training images; set it to "
        f"{max(2, images // 20)} or less, with a higher reconstruction.lr"
    )


def check_maskable(architecture: Architecture | BackboneArchitecture, image_size: int) -> None:
    """Raise ConfigError for an encoder or an image size with which patches cannot be hidden."""
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"{architecture.name} is not a plain vision transformer: patches cannot be hidden from it, so there is no "
            "reconstruction loss; leave --reconstruction out"
        )
    architecture.check_size(image_size, "the image size")
    if image_size == architecture.patch_size:
        raise ConfigError(f"images of {image_size} pixels are a single patch, too few to hide any")
