"""Rules that derive fine-tuning settings from the labelled images and the encoder, see docs/recipes.md.

They reproduce the published settings for ImageNet (all of it, 10% and 1%), few-shot iNaturalist and VTAB-1K, see
`presets/finetune`, and come close to the measured presets of two small encoders.
"""

from dataclasses import dataclass

from mimref.config.recipe import Derived, Recipe, is_character, power_of_two, two_digits
from mimref.data.sample import Appearance
from mimref.devices import ACTIVATION_BYTES, Machine, adapt_precision, derive_precision
from mimref.encoders.vit import Architecture
from mimref.transfer.finetune.config import FinetuneConfig

Rules = Recipe[FinetuneConfig]

MANY, SOME = 250_000, 100_000
"""From these numbers of images on, settings are as for all of ImageNet, and as for 10% of it."""
CPU_IMAGES = 100_000
"""Upper limit of the images seen in a run on a CPU, except that a run has at least 5 epochs."""
LEAST_UPDATES = 200
_PAPER_WIDTH = 768
_ENOUGH_PIXELS = 96


@dataclass(frozen=True)
class Labelled:
    """Numbers of images and classes."""

    images: int
    """Images of one training: all of them, or those chosen."""
    classes: int
    validation: int

    @property
    def is_subset(self) -> bool:
        """Whether the numbers of images and of images per class are like those of 1% to 10% of ImageNet."""
        return 10_000 <= self.images < MANY and 10 < self.images / self.classes <= 200


def fit(
    config: FinetuneConfig,
    labelled: Labelled,
    seen: Appearance,
    architecture: Architecture,
    machine: Machine,
    *,
    crop_known: bool = False,
) -> tuple[FinetuneConfig, list[Derived]]:
    """Derive all settings that are not set, or adapt a preset; return the settings and what was derived, in order.

    architecture: at the resolution of the images. crop_known: whether the weights record the evaluation crop. Raises
    ConfigError if values that the user set do not fit the derived ones.
    """
    recipe: Rules = Recipe(config)
    _choose_batch(recipe, labelled, architecture, machine)
    _choose_rate(recipe, labelled, architecture.width)
    _derive_schedule(recipe, labelled, architecture.width, machine)
    _derive_augmentation(recipe, labelled, seen, architecture.image_size)
    derive_precision(recipe)
    adapt_precision(recipe)
    side = seen.side or architecture.image_size
    if not crop_known and recipe.config.data.crop_fraction is None and 0.875 * side < architecture.image_size:
        recipe.derive("data.crop_fraction", 1.0, f"{side} pixels: there is no border to crop")
    return recipe.finish(), recipe.derived


def fit_choice(config: FinetuneConfig, depth: int, least: int) -> tuple[FinetuneConfig, list[Derived]]:
    """Adapt a preset's frozen blocks and its choice of images.

    depth: number of blocks of the encoder. least: number of images of the smallest class.
    """
    recipe: Rules = Recipe(config)
    if config.finetune.freeze_blocks > depth:
        recipe.adapt("finetune.freeze_blocks", depth // 4, f"a quarter of the encoder's {depth} blocks")
    if config.shots is not None and config.shots > least and not config.all_if_fewer:
        recipe.adapt("all_if_fewer", True, f"the smallest class has {least} images")
    return recipe.finish(), recipe.derived


# --- the rules, as functions of numbers


def batch_size(labelled: Labelled, cuda: bool) -> int:
    """Batch size: at most 1024 for ImageNet, 512 for 1% or 10% of it, else 256 (CPU: 128); 15+ updates an epoch."""
    most = 1024 if labelled.images >= MANY else 512 if labelled.is_subset else 256
    chosen = min(most if cuda else 128, power_of_two(labelled.images / 15))
    return min(labelled.images, max(4, chosen))


def base_rate(labelled: Labelled, batch: int, width: int) -> float:
    """Base learning rate: MAE's for many images, the release's 3e-5 for 1% and 10% of ImageNet, a fit for all others.

    The fit meets iNat18 and VTAB-1K: 1e-3 for batches of 256; for smaller ones, rate x batch is proportional to the
    square root of the batch. Encoders narrower than ViT-B get higher rates; the exponent matches the small presets.
    """
    narrow = (_PAPER_WIDTH / min(width, _PAPER_WIDTH)) ** 0.4
    if labelled.images >= MANY:
        return 1e-3 if width > _PAPER_WIDTH else two_digits(5e-4 * narrow)
    if labelled.is_subset and width > _PAPER_WIDTH:
        return 3e-5
    return two_digits(1e-3 * (256 / min(batch, 256)) ** 0.5 * narrow)


def epochs(labelled: Labelled, batch: int, width: int, cuda: bool) -> int:
    """Epochs: 50, or 100 for ViT-B on all of ImageNet; fewer for many images on a CPU, more to reach 200 updates."""
    found = 100 if labelled.images >= MANY and width <= _PAPER_WIDTH else 50
    if not cuda:
        found = min(found, max(5, round(CPU_IMAGES / labelled.images)))
    return max(found, min(200, -(-LEAST_UPDATES // max(1, labelled.images // batch))))


def drop_path(images: int, width: int) -> float:
    """Stochastic depth rate: MAE's for ViT-B, ViT-L and ViT-H with many images, else 0."""
    if images < MANY:
        return 0.0
    return 0.1 if width <= _PAPER_WIDTH else 0.2 if width <= 1024 else 0.3


def least_crop(size: int, side: int) -> float:
    """Smallest area share of a crop: 0.08 for photographs of 375 pixels and encoders of 224, 0.6 for equal sizes."""
    return min(0.6, max(0.08, float(f"{0.6 * (size / side) ** 4:.1g}")))


def validate_every(labelled: Labelled, epochs: int) -> int:
    """Epochs between validations, so that they take about a tenth of the time; at least five validations per run."""
    return max(1, min(epochs // 5, -(-10 * labelled.validation // (3 * labelled.images))))


# --- the settings that the rules derive


def _choose_batch(recipe: Rules, labelled: Labelled, architecture: Architecture, machine: Machine) -> None:
    images, found = labelled.images, batch_size(labelled, machine.cuda)
    recipe.derive("batch_size", max(2, found), f"a power of two that fits {images:,} labelled images")
    if recipe.config.batch_size > images:
        recipe.adapt("batch_size", found, f"there are {images:,} labelled images")
    if machine.memory_bytes is not None:
        tokens = (architecture.image_size // architecture.patch_size) ** 2 + 1
        image_bytes = ACTIVATION_BYTES * tokens * architecture.width * architecture.depth
        fits = power_of_two(machine.memory_bytes / 2 / image_bytes)
        if fits < recipe.config.batch_size / machine.processes:
            rule = (
                f"its activations take half of the GPU's {machine.memory_bytes / 2**30:.0f} GiB; the result is the same"
            )
            recipe.derive("micro_batch", fits, rule)


def _choose_rate(recipe: Rules, labelled: Labelled, width: int) -> None:
    batch, setting = recipe.config.batch_size, "finetune.lr"
    if labelled.images >= MANY:
        rule = "MAE's for so many images"
    elif labelled.is_subset and width > _PAPER_WIDTH:
        rule = "the release's for 1% and 10% of ImageNet"
    else:
        rule = f"as for iNat18's and VTAB-1K's few labels, at batches of {batch} and a width of {width}"
    recipe.derive(setting, base_rate(labelled, batch, width), rule)
    if (before := recipe.before("batch_size")) is not None:
        rate = two_digits(recipe.config.finetune.lr * (before / batch) ** 0.5)
        recipe.adapt(setting, rate, "its product with the batch follows the root of the batch")


def _derive_schedule(recipe: Rules, labelled: Labelled, width: int, machine: Machine) -> None:
    batch, images = recipe.config.batch_size, labelled.images
    found = epochs(labelled, batch, width, machine.cuda)
    rule = "as published" if found in (50, 100) else f"{CPU_IMAGES:,} images on a CPU"
    rule = f"for {LEAST_UPDATES} updates" if found * (images // batch) <= 2 * LEAST_UPDATES and found > 50 else rule
    recipe.derive("finetune.epochs", found, rule)
    chosen = recipe.config.finetune.epochs
    warmup, rule = two_digits(min(5.0, chosen / 10)), f"a tenth of {chosen} epochs, at most 5"
    recipe.derive("finetune.warmup_epochs", warmup, rule)
    if recipe.config.finetune.warmup_epochs > chosen:
        recipe.adapt("finetune.warmup_epochs", warmup, rule)
    many = images >= MANY
    decay = 0.65 if many and width <= _PAPER_WIDTH else 0.75
    recipe.derive("finetune.layer_decay", decay, "MAE's for ViT-B" if decay == 0.65 else "in all published settings")
    rule = f"MAE's for a width of {width}" if many else "none below 250,000 images, as published"
    recipe.derive("finetune.drop_path", drop_path(images, width), rule)
    every = validate_every(labelled, chosen)
    if every > 1:
        rule = f"{labelled.validation:,} validation images are many for {images:,} training images"
        recipe.derive("monitor.validate_every_epochs", every, rule)


def _derive_augmentation(recipe: Rules, labelled: Labelled, seen: Appearance, size: int) -> None:
    images, side = labelled.images, seen.side or size
    rule = f"images of {side} pixels for an encoder of {size}; 0.08 for photographs, as published"
    recipe.derive("augment.crop_scale", (least_crop(size, side), 1.0), rule)
    if is_character(recipe.config.data):
        recipe.derive("augment.flip", 0.0, "a mirrored character is another one")
    if (channels := recipe.config.data.channels) is not None:
        rule = f"its operations need 8-bit colour, but data.channels is {channels}"
        recipe.derive("augment.rand_augment", None, rule)
        recipe.adapt("augment.rand_augment", None, rule)
    elif seen.gray or min(size, side) < _ENOUGH_PIXELS:
        what = "gray images" if seen.gray else f"images of {min(size, side)} pixels"
        recipe.derive("augment.rand_augment", None, f"its operations are for colours and details; these are {what}")
    elif images < SOME:
        recipe.derive("augment.rand_augment", None, f"below {SOME:,} images, as published")
    if images < MANY:
        for name in ("erase", "mixup", "cutmix"):
            recipe.derive(f"augment.{name}", 0.0, f"below {MANY:,} images, as published")
