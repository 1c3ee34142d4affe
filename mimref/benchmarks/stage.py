"""A stage of a real refinement with random weights and synthetic images in memory, for the benchmarks of a step."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mimref.benchmarks.measure import PeakMemory
from mimref.data.loader import ViewBatch
from mimref.data.open import open_source
from mimref.data.pixels import Decoding
from mimref.data.sources import ArraySource, ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import check_colors
from mimref.devices import resolve_device
from mimref.encoders.backbones import EncoderArchitecture, new_encoder
from mimref.encoders.channels import for_images
from mimref.encoders.checkpoints import Checkpoint, read_checkpoint
from mimref.encoders.published import find_published
from mimref.encoders.settings import architecture_to_train, ignored_settings, named_architecture
from mimref.encoders.vit import PAPER_SIZES
from mimref.errors import ConfigError
from mimref.features.opening import without_limit
from mimref.progress import Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks
from mimref.refinement.memory import largest_micro_batch, release_memory
from mimref.refinement.plan import Plan, check_sizes, temperatures
from mimref.refinement.recipe import fit
from mimref.refinement.run import build_method
from mimref.refinement.schedule import StageName
from mimref.refinement.stages import EncoderStage, HeadsStage, RefinementStage
from mimref.training.run import TrainingRun

IMAGENET_IMAGES = 1_281_167


@contextmanager
def ready_stage(config: RefineConfig, stage: StageName) -> Iterator[tuple[RefinementStage, PeakMemory]]:
    """Yield a stage ready for its first update, and the memory that it takes. Leaves no files behind.

    Raises ConfigError for settings that do not fit the encoder.
    """
    architecture, _ = resolve_encoder(config)
    device = resolve_device(config.device)
    release_memory()
    memory = PeakMemory(device)
    with torch.device(device):
        weights = dict(new_encoder(architecture).model.state_dict())
    # One mean and one deviation apply to any number of channels.
    transform = EvalTransform(architecture.image_size, mean=(0.5,), std=(0.25,))
    checkpoint = Checkpoint(Path("random weights"), weights)
    plan = Plan(_both_stages(config), checkpoint, architecture, transform, _imagenet_like(config), [])
    made = HeadsStage if stage == "heads" else EncoderStage
    with tempfile.TemporaryDirectory() as folder:
        method = build_method(plan, Silent(), try_memory=False)
        yield made(TrainingRun(plan.config, Path(folder), None), plan, method), memory


def resolve_encoder(config: RefineConfig) -> tuple[EncoderArchitecture, list[int]]:
    """Return the encoder's architecture and the block of every head, without reading published weights.

    The encoder is that for images of `data.channels` channels or, if they are not set, of colour. Raises ConfigError
    for settings that do not fit the encoder, CheckpointError for weights from which the architecture cannot be
    inferred.
    """
    architecture, _ = _named_encoder(config)
    check_sizes(config, architecture)
    check_colors(config.views, image_channels(config))
    if config.heads.blocks == "auto":
        raise ConfigError("heads.blocks = 'auto' needs images, which a benchmark does not read; name the blocks")
    blocks = head_blocks(config.heads.blocks, architecture.depth)
    temperatures(config.heads.temperature, len(blocks))
    return architecture, blocks


def fitted(config: RefineConfig, *, read_data: bool) -> tuple[RefineConfig, list[str]]:
    """Return the settings with which a refinement would run, and a line for each that was derived, adapted or ignored.

    read_data: fit them to the images that they name; otherwise, and if they name none, to images like ImageNet's.
    Unlike `make_plan`, runs no encoder: a recipe takes the last third of the blocks. A preset's precision stays, as
    memory is predicted for other machines. Raises UserError subclasses.
    """
    architecture, ignored = _named_encoder(config)
    config, limited = without_limit(config, None) if read_data else (config, [])
    source = training_images(config) if read_data else _imagenet_like(config)
    source.labels = None  # for a recipe, which would measure every block of the encoder
    found, derived = fit(config, architecture, source)
    kept = [each for each in derived if each.setting != "precision" or each.before is None]
    if len(kept) < len(derived):
        found = found.model_copy(update={"precision": config.precision})
    return found, [*ignored, *map(str, [*limited, *kept])]


def _named_encoder(config: RefineConfig) -> tuple[EncoderArchitecture, list[str]]:
    """Return the encoder's architecture, and warnings about settings that its weights contradict."""
    settings, weights = config.encoder, config.encoder.weights
    published = None if weights is None else find_published(weights)
    if published is not None and published.arch in PAPER_SIZES:
        settings = settings.model_copy(update={"arch": published.arch, "source": published.source})
        weights = None
    if weights is None:
        return for_images(named_architecture(settings), image_channels(config)), []
    checkpoint = read_checkpoint(weights, settings)
    architecture = architecture_to_train(settings, checkpoint)
    return for_images(architecture, image_channels(config)), ignored_settings(settings, checkpoint)


def image_channels(config: RefineConfig) -> int:
    """Return the number of channels of the images."""
    return config.data.channels or 3


def crop_type(config: RefineConfig) -> torch.dtype:
    """Return the largest type in which crops reach the device: float32 if the channels' values are kept."""
    return torch.uint8 if config.data.channels is None else torch.float32


def training_images(config: RefineConfig) -> ImageSource:
    """Return the training images of the settings or, if they name none, images like those of ImageNet."""
    return _imagenet_like(config) if config.data.spec is None else open_source(config.data, "train")


def describe_encoder(architecture: EncoderArchitecture) -> str:
    """Return the encoder's name and size, for results."""
    return f"{architecture.name} {architecture.depth}x{architecture.width}/{architecture.patch_size}"


def largest_whole_batch(config: RefineConfig, device: torch.device) -> int:
    """Return how many images stage 2 encodes in one pass: the batch or, on CUDA, the half, quarter, ... that fits."""
    if device.type != "cuda":
        return config.batch_size
    with ready_stage(config.model_copy(update={"micro_batch": None}), "encoder") as (job, _):
        return largest_micro_batch(job.method, job.plan, config.batch_size, reserve=job.moments_to_come())


def synthetic_batch(job: RefinementStage) -> ViewBatch:
    """Make a batch of random pixels, in pinned memory if a GPU reads them."""
    config, generator = job.plan.config, torch.Generator().manual_seed(0)
    crops = []
    for group in job.crops:
        shape = (config.batch_size, group.count, image_channels(config), group.size, group.size)
        crops.append(torch.randint(256, shape, dtype=crop_type(config), generator=generator))
    batch = ViewBatch(0, torch.arange(config.batch_size), crops, [])
    return batch.pin_memory() if job.device.type == "cuda" else batch


def _both_stages(config: RefineConfig) -> RefineConfig:
    """Return the settings for a run of both stages; a stage without epochs has no learning-rate schedule."""
    update: dict[str, object] = {"stage": "both", "heads_from": None}
    for name, stage in (("heads_stage", config.heads_stage), ("encoder_stage", config.encoder_stage)):
        update[name] = stage.model_copy(update={"epochs": max(1, stage.epochs)})
    return config.model_copy(update=update)


def _imagenet_like(config: RefineConfig) -> ImageSource:
    """Make as many images as ImageNet has, of its usual size and of one colour; they take no memory."""
    levels = np.arange(image_channels(config), dtype=np.uint8) * 64
    images = np.lib.stride_tricks.as_strided(levels, (IMAGENET_IMAGES, len(levels), 375, 500), (0, 1, 0, 0))
    rows = np.broadcast_to(np.zeros(1, np.int64), (IMAGENET_IMAGES,))
    source = ArraySource("images like ImageNet's", images, None, None, "train", rows)
    source.decoding = Decoding(channels=config.data.channels)
    return source
