"""Rules that derive refinement settings from the encoder and the images; see docs/recipes.md.

Each rule reproduces the known points: the paper's settings (ImageNet, ViT-L) and those of the two measured presets for
small encoders (`quickstart`, `fashion_mnist`).
"""

import math
from pathlib import Path

from mimref.config.load import load_config
from mimref.config.recipe import Derived, Recipe, get, is_character, power_of_two
from mimref.data.loader import check_batch_size
from mimref.data.sample import Appearance, look_at
from mimref.data.sources import ImageSource
from mimref.data.views import colors_beyond
from mimref.devices import adapt_precision, derive_precision
from mimref.distributed.group import world_size
from mimref.encoders.backbones import EncoderArchitecture
from mimref.errors import ConfigError
from mimref.evaluation.blocks.statistics import blocks_text, recommend_heads
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks

SMALL_PIXELS = 64
"""Views with fewer pixels of detail per side are neither blurred nor, in evaluations, cropped."""
COARSE_PIXELS = 96
"""Views with fewer pixels of detail per side use the larger crops of the small presets."""
LEAST_QUEUE = 4
"""Smallest queue that always has a row of another image: at most three of its rows belong to the same image."""
_IMAGENET = 1_281_167
_FEW = 10_000
"""Number of images up to which a number of updates sets the epochs; above, they rise to the paper's."""
_SHARED_HEADS = ("blocks", "pool", "norm", "projector_hidden", "predictor_hidden", "output", "queue_size")


def fit(
    config: RefineConfig, architecture: EncoderArchitecture, source: ImageSource, *, crop_known: bool = False
) -> tuple[RefineConfig, list[Derived]]:
    """Derive all settings that are not set, or adapt a preset; return the settings and a list of what was derived.

    source: the training images. crop_known: whether the weights record the crop of evaluations. Raises ConfigError if
    values that the user has set do not fit the derived ones, DataError if images cannot be fetched.
    """
    recipe = Recipe(config)
    if config.preset is not None:
        adapt(recipe, architecture, len(source))
        if source.channels != 3:
            _adapt_colours(recipe, source.channels)
    else:
        check_batch_size(max(2, world_size()), len(source))
        _derive(recipe, architecture, source, crop_known)
    return recipe.finish(), recipe.derived


def with_counts(config: RefineConfig, images: int) -> RefineConfig:
    """Return the settings, with a preset's values adapted to the number of images: `fit` without an encoder."""
    recipe = Recipe(config)
    if config.preset is not None and images > 1:
        _adapt_counts(recipe, images)
    return recipe.config


# --- the rules, as functions of numbers


def batch_size(images: int) -> int:
    """Return 128, half the images if fewer than 256, or their square root from 65,536: powers of two, at most 1024."""
    return min(1024, max(2, power_of_two(min(128, images // 2)), power_of_two(math.isqrt(images))))


def queue_size(images: int) -> int:
    """Return the largest power of two that is at most half the number of images, limited to 4..65,536 rows."""
    return min(65_536, max(LEAST_QUEUE, power_of_two(images // 2)))


def epochs(images: int, batch: int) -> tuple[int, int]:
    """Return the epochs of both stages: 3 + 8 for 10,000 images, 20 + 30 for ImageNet (the paper), a power law between.

    Fewer images or larger batches get as many epochs as 225 + 600 updates need, at most 40 + 100.
    """
    place = min(1.0, max(0.0, math.log(images / _FEW) / math.log(_IMAGENET / _FEW)))
    steps = max(1, images // batch)
    first = max(round(3 * (20 / 3) ** place), min(40, -(-225 // steps)))
    return first, max(round(8 * (30 / 8) ** place), min(100, -(-600 // steps)))


def warmup_epochs(epochs: int, steps: int) -> float:
    """Return a fifth of the epochs, but at most 4 epochs or 100 updates, whichever is longer."""
    return float(f"{min(epochs / 5, max(4.0, 100 / steps)):.4g}")


def heads_rate(hidden: int, batch: int) -> float:
    """Return the base learning rate of stage 1 for projectors with this hidden width."""
    return _base_rate(min(1.5e-3, 8e-4 * 2048 / min(hidden, 2048) * math.sqrt(batch / 1024)), batch)


def encoder_rate(width: int, batch: int) -> float:
    """Return the base learning rate of stage 2 for an encoder of this width."""
    return _base_rate(min(4e-3, 1.6e-3 * 1024 / min(width, 1024) * math.sqrt(batch / 1024)), batch)


def _base_rate(peak: float, batch: int) -> float:
    return float(f"{peak * 256 / batch:.3g}")


def average_decay(updates: int) -> float:
    """Return the EMA decay for 1, 2 or 5 times 10^n updates, at most 10,000 and 1 / 3.75 of the run (the paper's)."""
    longest = max(1.0, min(10_000.0, updates / 3.75))
    power: int = 10 ** int(math.log10(longest))
    window = max(step * power for step in (1, 2, 5) if step * power <= longest)
    return round(1 - 1 / window, 6)


def top_k(queue: int) -> int:
    """Return 20 for 65,536 rows, falling with the square root; at least 5, but at most an eighth of the queue."""
    return max(1, min(queue // 8, max(5, min(20, round(20 * math.sqrt(queue / 65_536))))))


def head_widths(width: int) -> tuple[int, int, int]:
    """Return hidden widths of projectors and predictors, and the output width: the paper's for encoders above 256."""
    hidden = min(2048, max(256, power_of_two(4 * width - 1) * 2))
    return hidden, 2 * hidden, 256 if hidden == 2048 else 128


def local_size(size: int, patch: int, coarse: bool) -> int:
    """Return the least multiple of the patch (or step) that is at least 3/7 of `size` (96 of 224), 4/7 if coarse."""
    return min(size, patch * -(-size * (4 if coarse else 3) // (7 * patch)))


# --- without a preset


def _derive(
    recipe: Recipe[RefineConfig], architecture: EncoderArchitecture, source: ImageSource, crop_known: bool
) -> None:
    if recipe.config.heads_from is not None:
        _share_heads(recipe, recipe.config.heads_from)
    images, seen = len(source), look_at(source)
    _derive_heads(recipe, architecture, source)
    _derive_sizes(recipe, images)
    _derive_training(recipe, architecture, images)
    _derive_views(recipe, architecture, seen)
    _derive_evaluation(recipe, images, min(architecture.image_size, seen.side or architecture.image_size), crop_known)
    derive_precision(recipe)


def _share_heads(recipe: Recipe[RefineConfig], heads_from: str) -> None:
    """Derive the settings that must match those of the run whose heads are reused."""
    folder = Path(heads_from) if Path(heads_from).is_dir() else Path(heads_from).parent
    if (file := folder / "config.toml").is_file():
        other = load_config(RefineConfig, str(file))
        for name in _SHARED_HEADS:
            recipe.derive(f"heads.{name}", getattr(other.heads, name), f"the same as in {heads_from}")


def _derive_heads(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture, source: ImageSource) -> None:
    if source.labels is not None:
        recipe.derive("heads.blocks", "auto", "")  # measured by `make_plan`, which has the encoder
    else:
        recipe.derive("heads.blocks", last_third(architecture.depth), "the last third of the blocks, as in the paper")
    width = architecture.width
    hidden, predictor, output = head_widths(width)
    why = "the paper's" if hidden == 2048 else f"4 times the encoder's width of {width}, as a power of two from 256 on"
    recipe.derive("heads.projector_hidden", hidden, why)
    recipe.derive("heads.predictor_hidden", predictor, "twice the projector's width, as in the paper")
    recipe.derive("heads.output", output, "the paper's" if output == 256 else "half the paper's, for small heads")


def last_third(depth: int) -> str:
    """Return the blocks for heads when no curve was measured: those recommended for one that rises to the end."""
    return blocks_text(recommend_heads(range(1, depth + 1)))


def _derive_sizes(recipe: Recipe[RefineConfig], images: int) -> None:
    batch = batch_size(images)
    if batch > 128:
        why = f"the square root of {images:,} images, as a power of two; at most the paper's 1,024"
    else:
        why = f"a power of two, at most half of {images} images" if images > 3 else "the smallest batch"
        why = "as in the small presets" if batch == 128 else why
    recipe.derive("batch_size", batch, why)
    queue = queue_size(images)
    most = "the paper's" if queue == 65_536 else f"a power of two, at most half of {images:,} images"
    recipe.derive("heads.queue_size", queue, most if images > 7 else "the smallest queue with rows of other images")
    config = recipe.config
    if config.batch_size < 512:
        recipe.derive("heads.temperature", 0.3, "measured with batches of 128")
    else:
        recipe.derive("heads.temperature", 0.2, "the paper's for ViT-L")
    rows = config.heads.queue_size
    nearest = top_k(rows)
    why = "the paper's" if nearest == 20 else f"fewer than the paper's 20, as the queue has {rows:,} rows"
    recipe.derive("encoder_stage.top_k", nearest, why)


def _derive_training(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture, images: int) -> None:
    batch = recipe.config.batch_size
    steps = max(1, images // batch)
    for name, number in zip(("heads_stage", "encoder_stage"), epochs(images, batch), strict=True):
        recipe.derive(
            f"{name}.epochs", number, f"{number * steps:,} updates of {batch} images; {_why_epochs(images, name)}"
        )
        chosen: int = get(recipe.config, f"{name}.epochs")
        warmup = warmup_epochs(chosen, steps)
        why = "a fifth of the epochs, at most 4" if warmup <= 4 else "a fifth of the epochs, at most 100 updates"
        recipe.derive(f"{name}.warmup_epochs", warmup, why)
    config, width = recipe.config, architecture.width
    hidden = config.heads.projector_hidden
    for name, rate, of in (
        ("heads_stage", heads_rate(hidden, batch), f"heads of width {hidden}"),
        ("encoder_stage", encoder_rate(width, batch), f"an encoder of width {width}"),
    ):
        why = f"{rate * batch / 256:.2g} at the peak, for {of} and batches of {batch}"
        recipe.derive(f"{name}.lr", rate, why)
    updates = config.encoder_stage.epochs * steps
    decay = average_decay(updates)
    why = f"averages over {1 / (1 - decay):,.0f} of {updates:,} updates; {100 * decay**updates:.1f}% of the base remain"
    recipe.derive("encoder_stage.ema", decay, why)


def _why_epochs(images: int, name: str) -> str:
    few, paper, least, most = (3, 20, 225, 40) if name == "heads_stage" else (8, 30, 600, 100)
    if images > _FEW:
        return f"from {few} for 10,000 images to the paper's {paper} for ImageNet"
    return f"at least {least}, but at most {most} epochs"


def _derive_views(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture, seen: Appearance) -> None:
    size = recipe.config.views.global_size or architecture.image_size
    detail = min(size, seen.side) if seen.images else size
    coarse = detail < COARSE_PIXELS
    if coarse:
        why = f"views of {detail} pixels: smaller crops show too little"
        recipe.derive("views.global_scale", (0.5, 1.0), why)
        recipe.derive("views.local_scale", (0.3, 0.7), why)
        recipe.derive("views.local_views", 4, "a local view costs a third of a global one, not a fifth as in the paper")
    if detail < SMALL_PIXELS:
        recipe.derive("views.blur", False, f"{detail} pixels have no detail to lose")
    elif size < 224:
        recipe.derive("views.blur_sigma", (0.1, round(2 * size / 224, 2)), f"the paper's, for {size} of 224 pixels")
    local = local_size(size, architecture.sizes.step, coarse)
    recipe.derive("views.local_size", local, f"{'4/7' if coarse else '3/7'} of {size} pixels, {_steps(architecture)}")
    if is_character(recipe.config.data):
        recipe.derive("views.flip", 0.0, "a mirrored character is another one")
    looked = f"{seen.colored} of {seen.images} sampled images have colours"
    if seen.channels not in (1, 3):
        why = _without_colour(seen.channels)
        recipe.derive("views.jitter", (0.4, 0.4, 0.0, 0.0), f"brightness and contrast alone: {why}")
        recipe.derive("views.gray_probability", 0.0, why)
        recipe.derive("views.solarize_probability", (0.0, 0.0, 0.0), why)
    elif seen.gray or architecture.channels == 1:
        recipe.derive("views.jitter", (0.4, 0.4, 0.0, 0.0), f"brightness and contrast alone: {looked}")
        recipe.derive("views.gray_probability", 0.0, "the images are gray")
        recipe.derive("views.solarize_probability", (0.0, 0.0, 0.0), "gray images: measured without solarization")
    else:
        recipe.derive("views.color", True, looked)


def _without_colour(channels: int) -> str:
    return f"images of {channels} channel{'s' if channels > 1 else ''} have no colours"


def _derive_evaluation(recipe: Recipe[RefineConfig], images: int, detail: int, crop_known: bool) -> None:
    if detail < SMALL_PIXELS and not crop_known and recipe.config.data.crop_fraction is None:
        recipe.derive("data.crop_fraction", 1.0, f"{detail} pixels: there is no border to crop")
    if images <= 2 * _FEW:
        recipe.derive("evaluate.splits", 20, "the result of few images depends on the draw")
    every = -(-recipe.config.encoder_stage.epochs // 30)
    if every > 1:
        recipe.derive("monitor.knn_every_epochs", every, "at most 30 checks")


# --- with a preset


def adapt(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture, images: int) -> None:
    """Replace the values of a preset that do not fit the encoder, the images or the device."""
    if images > 1:
        _adapt_counts(recipe, images)
    _adapt_sizes(recipe, architecture)
    _adapt_heads(recipe, architecture)
    adapt_precision(recipe)


def _adapt_counts(recipe: Recipe[RefineConfig], images: int) -> None:
    have = f"there are {images:,} training images"
    if recipe.config.batch_size > images:
        recipe.adapt("batch_size", batch_size(images), have)
    config = recipe.config
    if isinstance(config.micro_batch, int) and config.micro_batch > config.batch_size:
        recipe.adapt("micro_batch", config.batch_size, f"batches have {config.batch_size} images")
    if config.heads.queue_size > max(images, config.batch_size):
        recipe.adapt("heads.queue_size", queue_size(images), have)
    queue = recipe.config.heads.queue_size
    for setting in ("heads_stage.top_k", "encoder_stage.top_k"):
        if get(recipe.config, setting) > queue - 3:
            recipe.adapt(setting, top_k(queue), f"the queue has {queue} rows")


def _steps(architecture: EncoderArchitecture) -> str:
    """Say what the sizes of views are rounded to."""
    rule = architecture.sizes
    if rule.step == architecture.patch_size:
        return "in whole patches"
    return "the only size that the encoder takes" if rule.step == rule.largest else f"in steps of {rule.step} pixels"


def _adapt_sizes(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture) -> None:
    rule, views = architecture.sizes, recipe.config.views
    patches = f"the encoder has patches of {rule.step} pixels"
    why = patches if _steps(architecture) == "in whole patches" else f"sizes of views: {_steps(architecture)}"
    if views.global_size is not None and (nearest := rule.nearest(views.global_size)) != views.global_size:
        recipe.adapt("views.global_size", nearest, why)
    views = recipe.config.views
    size = views.global_size or architecture.image_size
    if views.local_views and views.local_size > size:
        larger = f"the global views have {size} pixels"
        recipe.adapt("views.local_size", local_size(size, rule.step, size < COARSE_PIXELS), larger)
    elif views.local_views and (nearest := rule.nearest(views.local_size)) != views.local_size:
        recipe.adapt("views.local_size", min(nearest, size), why)


def _adapt_colours(recipe: Recipe[RefineConfig], channels: int) -> None:
    for name, value in colors_beyond(recipe.config.views).items():
        recipe.adapt(f"views.{name}", value, _without_colour(channels))


def _adapt_heads(recipe: Recipe[RefineConfig], architecture: EncoderArchitecture) -> None:
    depth = architecture.depth
    if recipe.config.heads.blocks == "auto":
        return
    try:
        blocks = head_blocks(recipe.config.heads.blocks, depth)
    except ConfigError:
        recipe.adapt("heads.blocks", last_third(depth), f"the encoder has {depth} blocks")
        blocks = head_blocks(last_third(depth), depth)
    config = recipe.config
    temperature = config.heads.temperature
    if isinstance(temperature, list) and len(temperature) != len(blocks):
        recipe.adapt("heads.temperature", temperature[-1], f"there are {len(blocks)} heads")
    if config.encoder_stage.freeze_blocks >= max(blocks):
        recipe.adapt("encoder_stage.freeze_blocks", 0, f"the last head reads block {max(blocks)}")
    if config.loss.schedule != "constant" and len(blocks) < 2:
        recipe.adapt("loss.schedule", "constant", "there is one head")
