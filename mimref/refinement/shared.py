"""The objects that both stages of a refinement share."""

from pathlib import Path
from typing import Any

import torch

from mimref.data.photometric import Photometric
from mimref.data.views import multi_crop
from mimref.devices import keep_freed_memory, resolve_device, resolve_precision
from mimref.distributed.collectives import agree
from mimref.distributed.group import alone, world_size
from mimref.encoders.checkpoints import load_weights, weights_hash
from mimref.encoders.parameters import freeze_untrained
from mimref.encoders.vit import Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError
from mimref.evaluation.monitor import KnnMonitor
from mimref.files import atomic_write
from mimref.progress import Listener
from mimref.refinement.heads import Heads
from mimref.refinement.memory import check_exact, largest_that_fits, try_step
from mimref.refinement.method import RefinementStep
from mimref.refinement.plan import Plan
from mimref.refinement.queue import Queue
from mimref.training.ema import WeightAverage
from mimref.training.log import SkippedImages


class Refinement:
    """What both stages share: encoder, heads, queue and monitor."""

    def __init__(self, plan: Plan, listener: Listener) -> None:
        self.plan, self.config, self.listener = plan, plan.config, listener
        config = plan.config
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.encoder = self.base_encoder()
        freeze_untrained(self.encoder, first=config.encoder_stage.freeze_blocks, last=max(plan.blocks))
        self.base_hash = weights_hash(self.encoder)
        torch.manual_seed(config.seed)
        self.heads = Heads(config.heads, len(plan.blocks), self.encoder.embed_dim).to(self.device)
        self.queue = Queue(
            len(plan.blocks),
            config.heads.queue_size,
            config.heads.output,
            generator=torch.Generator().manual_seed(config.seed),
            device=self.device,
        )
        self.stepper = RefinementStep(
            self.encoder,
            self.heads,
            self.queue,
            Photometric(config.views, config.seed, self.device, mean=plan.transform.mean, std=plan.transform.std),
            blocks=plan.blocks,
            temperature=plan.temperature,
            pool=config.heads.pool,
            direction=config.loss.direction,
            swap_negatives=config.loss.swap_negatives,
            seed=config.seed,
            precision=self.precision,
        )
        labels = plan.source.labels
        self.labels = None if labels is None else torch.from_numpy(labels).to(self.device)
        self.encoder.checkpointing = config.activation_checkpointing
        self.stepper.most_images = -(-config.batch_size // world_size())
        self.stepper.micro_batch = self._micro_batch()
        self.stepper.distribute_heads()
        if config.compile:
            self._compile()
        self.monitor = KnnMonitor(config, plan.source, plan.transform, self.device, self.precision, note=listener.note)
        self.skipped = SkippedImages(config.data.max_bad, listener)
        self.average: WeightAverage | None = None
        self.nn_accuracy: list[float] = []
        self.elapsed_s = 0.0

    def _micro_batch(self) -> int | None:
        """Images per encoder pass as the settings say; `auto` tries what fits."""
        asked = self.config.micro_batch
        if asked is None:
            return None
        check_exact(self.encoder)
        if isinstance(asked, int):
            return asked
        if self.device.type != "cuda":
            # The memory of other devices is the machine's, which does not say when it is full.
            self.listener.note(f"micro_batch auto: whole batches on {self.device.type}")
            return None
        most = self.stepper.most_images
        # The smallest that any rank finds.
        found = -agree(-self.largest_micro_batch(most, reserve=self._state_to_come()))
        self.listener.note(f"micro_batch auto: {found} of {most} images per encoder pass")
        return found

    def _compile(self) -> None:
        """Compile what training runs, in place, so that weights keep their names."""
        # One piece of code for all blocks; with dynamic shapes, for both sizes of views as well.
        for block in self.encoder.vit.blocks:
            block.compile(dynamic=True)
        self.heads.compile(dynamic=True)

    def _state_to_come(self) -> int:
        """Numbers that the run will hold beside weights and gradients: AdamW's two moments, and the average."""
        of_heads, of_encoder = (list(module.parameters()) for module in (self.heads, self.encoder))
        trained = of_heads + ([] if self.config.stage == "heads" else of_encoder)
        moments = 2 * sum(weight.numel() for weight in trained if weight.requires_grad)
        return moments + (0 if self.config.stage == "heads" else sum(weight.numel() for weight in of_encoder))

    def largest_micro_batch(self, most: int, *, reserve: int) -> int:
        """The largest micro-batch up to `most` for which the device has memory beside `reserve` float32 numbers.

        Not for heads and encoder that are distributed: they would wait for other ranks.
        """
        groups = multi_crop(self.config.views, self.plan.architecture.image_size)
        size, train_encoder = self.stepper.most_images, self.config.stage != "heads"

        def attempt(micro: int) -> None:
            try_step(self.stepper, groups, size, micro, reserve=reserve, train_encoder=train_encoder)

        with alone():
            return largest_that_fits(attempt, most)

    def base_encoder(self) -> Encoder:
        """The encoder as it was given."""
        with torch.device("meta"):
            encoder = build_encoder(self.plan.architecture)
        load_weights(encoder, self.plan.checkpoint, share=self.device.type != "cpu")
        return encoder.to(self.device).eval()

    def result_encoder(self) -> Encoder:
        """The averaged encoder of stage 2; before it, the encoder as it was given."""
        if self.average is None:
            return self.encoder
        averaged = self.average.module
        assert isinstance(averaged, Encoder)
        return averaged

    def save_heads(self, path: Path) -> None:
        """Hand over stage 1: heads and queue, and what they fit."""
        made_for = {
            "base": self.base_hash,
            "blocks": self.plan.blocks,
            "pool": self.config.heads.pool,
            "images": self.plan.source.fingerprint,
        }
        with atomic_write(path) as stream:
            torch.save({**made_for, "heads": self.heads.state_dict(), "queue": self.queue.state_dict()}, stream)

    def load_heads(self, folder: Path) -> None:
        """Take over another run's stage 1. Raises CheckpointError when it does not fit this run."""
        path = folder / "heads.pt" if folder.is_dir() else folder
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; --heads-from needs the output folder of a run with stage 1")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            base, blocks, pool, images = (saved[key] for key in ("base", "blocks", "pool", "images"))
        except Exception as error:
            raise CheckpointError(f"{path}: not readable as the heads of a run") from error
        if base != self.base_hash:
            raise CheckpointError(
                f"{path}: these heads were trained on another encoder than {self.plan.checkpoint.path}"
            )
        if blocks != self.plan.blocks:
            numbers = ",".join(map(str, blocks))
            raise ConfigError(f"{path}: its heads read the blocks {numbers}; set heads.blocks={numbers}")
        if pool != self.config.heads.pool:
            raise ConfigError(f"{path}: its heads read {pool!r} tokens; set heads.pool={pool}")
        self._take_heads(path, saved["heads"], saved["queue"])
        if images != self.plan.source.fingerprint:
            self.queue.sample_Q.fill_(-1)
            self.listener.warn(f"{path}: its queue was filled from other images, or files that have changed since")

    def _take_heads(self, path: Path, heads: dict[str, Any], queue: dict[str, Any]) -> None:
        config, size = self.config.heads, len(queue["sample"])
        if size != config.queue_size:
            raise ConfigError(f"{path}: its queue holds {size} rows; set heads.queue_size={size}")
        try:
            self.heads.load_state_dict(heads)
            self.queue.load_state_dict(queue)
        except RuntimeError as error:
            raise ConfigError(
                f"{path}: its heads have other widths than heads.projector_hidden {config.projector_hidden}, "
                f"heads.predictor_hidden {config.predictor_hidden} and heads.output {config.output}"
            ) from error
