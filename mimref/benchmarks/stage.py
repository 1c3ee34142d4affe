"""A stage of a real refinement with random weights and synthetic images in memory, for the benchmarks of a step."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mimref.benchmarks.measure import PeakMemory
from mimref.data.loader import ViewBatch
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device
from mimref.encoders.backbones import EncoderArchitecture, new_encoder
from mimref.encoders.channels import for_images
from mimref.encoders.checkpoints import Checkpoint, read_checkpoint
from mimref.encoders.published import find_published
from mimref.encoders.settings import architecture_to_train, named_architecture
from mimref.errors import ConfigError
from mimref.progress import Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks
from mimref.refinement.memory import largest_micro_batch, release_memory
from mimref.refinement.plan import Plan, check_sizes, temperatures
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
    images = _image_list(IMAGENET_IMAGES)
    checkpoint, transform = Checkpoint(Path("random weights"), weights), EvalTransform(architecture.image_size)
    plan = Plan(_both_stages(config), checkpoint, architecture, transform, images, [])
    made = HeadsStage if stage == "heads" else EncoderStage
    with tempfile.TemporaryDirectory() as folder:
        method = build_method(plan, Silent(), try_memory=False)
        yield made(TrainingRun(plan.config, Path(folder), None), plan, method), memory


def resolve_encoder(config: RefineConfig) -> tuple[EncoderArchitecture, list[int]]:
    """Return the encoder's architecture and the block of every head, without reading published weights.

    Encoders for images other than colour are treated as encoders for colour images. Raises ConfigError for settings
    that do not fit the encoder, CheckpointError for weights from which the architecture cannot be inferred.
    """
    weights = config.encoder.weights
    if weights is None or find_published(weights) is not None:
        architecture = named_architecture(config.encoder)
    else:
        architecture = architecture_to_train(config.encoder, read_checkpoint(weights, config.encoder))
    architecture = for_images(architecture, 3)
    check_sizes(config, architecture)
    if config.heads.blocks == "auto":
        raise ConfigError("heads.blocks = 'auto' needs images, which a benchmark does not read; name the blocks")
    blocks = head_blocks(config.heads.blocks, architecture.depth)
    temperatures(config.heads.temperature, len(blocks))
    return architecture, blocks


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
        shape = (config.batch_size, group.count, 3, group.size, group.size)
        crops.append(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
    batch = ViewBatch(0, torch.arange(config.batch_size), crops, [])
    return batch.pin_memory() if job.device.type == "cuda" else batch


def _both_stages(config: RefineConfig) -> RefineConfig:
    """Return the settings for a run of both stages; a stage without epochs has no learning-rate schedule."""
    update: dict[str, object] = {"stage": "both", "heads_from": None}
    for name, stage in (("heads_stage", config.heads_stage), ("encoder_stage", config.encoder_stage)):
        update[name] = stage.model_copy(update={"epochs": max(1, stage.epochs)})
    return config.model_copy(update=update)


def _image_list(images: int) -> ArraySource:
    """Make an image source of which only the length matters."""
    pixels = np.broadcast_to(np.zeros(1, np.uint8), (images, 1, 1))
    return ArraySource("synthetic", pixels, None, None, "train", np.broadcast_to(np.zeros(1, np.int64), (images,)))
