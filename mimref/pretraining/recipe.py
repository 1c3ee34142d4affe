"""Rules that derive pre-training settings from the images and the machine; see docs/recipes.md.

For a million photographs on CUDA the rules give MAE's own settings (He et al. 2022), or SimMIM's masks, crops and
learning rate (Xie et al. 2022). On a CPU they give an encoder and a number of epochs that one core trains in about 20
minutes, close to the presets for digits and Fashion-MNIST.
"""

from mimref.config.recipe import Derived, Recipe, is_character, power_of_two, two_digits
from mimref.data.sample import Appearance
from mimref.devices import ACTIVATION_BYTES, Machine, adapt_precision
from mimref.encoders.vit import PAPER_SIZES
from mimref.pretraining.config import PretrainConfig

Rules = Recipe[PretrainConfig]

# He et al. (2022): settings for ImageNet-1K.
PAPER_BATCH, PAPER_LR, PAPER_WIDTH = 4096, 1.5e-4, 768
# Xie et al. (2022): settings for ViT-B, from the authors' settings file.
SIMMIM_BATCH, SIMMIM_LR = 2048, 5e-5
PAPER_EPOCHS, PAPER_IMAGES = 800, 1_281_167
LEAST_UPDATES = 8
"""Least number of updates per epoch."""
CPU_PATCHES = 16_000_000
"""Patches that a masked autoencoder is trained on in total on a CPU; its encoder skips the hidden ones."""
SIMMIM_CPU_PATCHES = 5_000_000
"""The same for SimMIM, whose encoder processes all patches."""
_PATCH_SIZES = (4, 8, 16)
_UNKNOWN_SIDE = 224
"""Assumed side of images that cannot be read, in pixels; the run then reports them."""


def fit(
    config: PretrainConfig, images: int, seen: Appearance, machine: Machine
) -> tuple[PretrainConfig, list[Derived]]:
    """Derive all settings that are not set, or adapt a preset; return the settings and a list of what was derived.

    images: number of training images. seen: a sample of them. Raises ConfigError if values that the user has set do not
    fit the derived ones.
    """
    recipe: Rules = Recipe(config)
    side = seen.side or _UNKNOWN_SIDE
    if "arch" not in config.encoder.model_fields_set or config.encoder.arch == "custom":
        _derive_encoder(recipe, images, side, machine)
    if config.objective == "mae":
        _derive_decoder(recipe)
    _derive_views(recipe, side)
    _choose_batch(recipe, images, machine)
    _choose_rate(recipe)
    _derive_schedule(recipe, images, machine)
    adapt_precision(recipe)
    return recipe.finish(), recipe.derived


# --- the rules, as functions of numbers


def patch_size(side: int, grid: int) -> int:
    """Return the first of 4, 8 and 16 pixels that gives images of this side about `grid` patches a side, or fewer."""
    return next((size for size in _PATCH_SIZES if size * grid >= 0.8 * side), _PATCH_SIZES[-1])


def encoder_size(images: int, cuda: bool) -> tuple[int, int]:
    """Return width and depth: on CUDA ViT-Ti, from 50,000 images ViT-S, from 500,000 ViT-B; otherwise 96 x 8."""
    if not cuda:
        return 96, 8
    return (768, 12) if images >= 500_000 else (384, 12) if images >= 50_000 else (192, 12)


def decoder_size(width: int) -> tuple[int, int, int]:
    """Return width, depth and heads: MAE's for widths from 768, the small presets' below 192, others in between."""
    sizes = ((768, (512, 8, 16)), (384, (256, 4, 8)), (192, (128, 2, 4)), (0, (48, 1, 3)))
    return next(size for least, size in sizes if width >= least)


def least_crop(size: int, side: int) -> float:
    """Return the least area of a crop: MAE's 0.2 for large photographs, 0.6 for images as small as the encoder's."""
    return min(0.6, max(0.2, round(0.6 * (size / side) ** 2, 1)))


def batch_size(images: int, cuda: bool) -> int:
    """Return 1/256 of the images, at least 128, at most MAE's 4096 on CUDA and 128 elsewhere; of few images, 1/8."""
    if images < 128 * LEAST_UPDATES:
        return min(images, max(4, power_of_two(images / LEAST_UPDATES)))
    return max(128, min(PAPER_BATCH if cuda else 128, power_of_two(images / 256)))


def fitting_batch(
    memory_bytes: int, tokens: int, visible: int, encoder: tuple[int, int], decoder: tuple[int, int]
) -> int:
    """Return the largest power of two of images whose activations take at most half of the GPU's memory.

    tokens: tokens per image. visible: those that the encoder processes. encoder, decoder: width and depth.
    """
    numbers = visible * encoder[0] * encoder[1] + tokens * decoder[0] * decoder[1]
    return power_of_two(memory_bytes / 2 / (ACTIVATION_BYTES * numbers))


def base_rate(batch: int, width: int) -> float:
    """Return MAE's base rate, scaled so that rate times batch follows the square root of the batch.

    Narrower encoders get a higher rate: the exponent 0.4 of the width reproduces the 2e-3 of the presets with width 96
    and batches of 128.
    """
    return two_digits(PAPER_LR * (PAPER_BATCH / batch) ** 0.5 * (PAPER_WIDTH / min(width, PAPER_WIDTH)) ** 0.4)


def simmim_rate(batch: int, width: int) -> float:
    """Return SimMIM's base rate: rate times batch follows the batch's square root and the inverse of the width."""
    return two_digits(SIMMIM_LR * (SIMMIM_BATCH / batch) ** 0.5 * PAPER_WIDTH / min(width, PAPER_WIDTH))


def epochs(images: int, patches: int, cuda: bool, cpu_patches: int = CPU_PATCHES) -> int:
    """Return 800 for a million images, 1600 for few; on a CPU what `cpu_patches` (20 minutes) allow, at most 400."""
    if not cuda:
        return min(400, max(10, round(cpu_patches / patches / images)))
    most = PAPER_EPOCHS if images >= 100_000 else 2 * PAPER_EPOCHS
    return min(most, max(50, round(PAPER_EPOCHS * PAPER_IMAGES / images)))


# --- the settings that the rules give


def _sizes(recipe: Rules) -> tuple[int, int, int]:
    """Return the encoder's width, depth and patches per side."""
    encoder = recipe.config.encoder
    width, depth, _, patch = PAPER_SIZES.get(
        encoder.arch, (encoder.width or PAPER_WIDTH, encoder.depth or 12, 0, encoder.patch_size or 16)
    )
    return width, depth, max(1, encoder.image_size // patch)


def _derive_encoder(recipe: Rules, images: int, side: int, machine: Machine) -> None:
    """Derive image size, patch size, width, depth and heads if the user has not named an encoder."""
    most, grid, device = (224, 14, "CUDA") if machine.cuda else (64, 8, "a CPU")
    given = recipe.config.encoder
    wanted = given.image_size if "image_size" in given.model_fields_set else max(16, min(side, most))
    rule = f"the first of 4, 8 and 16 that gives about {grid} patches a side or fewer, on {device}"
    recipe.derive("encoder.patch_size", patch_size(wanted, grid), rule)
    patch = recipe.config.encoder.patch_size or 16
    rule = f"whole patches in the images' median shorter side of {side} pixels, at most {most} on {device}"
    recipe.derive("encoder.image_size", max(2, min(wanted // patch, grid)) * patch, rule)
    width, depth = encoder_size(images, machine.cuda)
    rule = f"ViT-Ti, -S from 50,000 or -B from 500,000, for {images:,} images on CUDA"
    rule = rule if machine.cuda else "as in the measured presets: one CPU core can train it"
    recipe.derive("encoder.width", width, rule)
    recipe.derive("encoder.depth", depth, rule)
    width = recipe.config.encoder.width or width
    most = max(1, width // (64 if width % 64 == 0 else 32))
    heads = next(number for number in range(most, 0, -1) if width % number == 0)
    recipe.derive("encoder.num_heads", heads, f"{width // heads} channels each")
    encoder = recipe.config.encoder
    is_paper = (encoder.width, encoder.depth, encoder.num_heads, encoder.patch_size) == PAPER_SIZES["vit_b16"]
    recipe.derive("encoder.arch", "vit_b16" if is_paper else "custom", "the name of these sizes")


def _derive_decoder(recipe: Rules) -> None:
    width, _, _ = _sizes(recipe)
    rule = f"for an encoder {width} wide: MAE's from 768 on, the measured presets' below 192"
    for name, value in zip(("width", "depth", "num_heads"), decoder_size(width), strict=True):
        recipe.derive(f"mae.decoder.{name}", value, rule)


def _derive_views(recipe: Rules, side: int) -> None:
    size = recipe.config.encoder.image_size
    if recipe.config.objective == "mae":
        rule = f"0.6 times the square of {size} over {side} pixels, between 0.2 (MAE) and 0.6 (measured presets)"
        recipe.derive("mae.crop_scale", (least_crop(size, side), 1.0), rule)
    if is_character(recipe.config.data):
        recipe.derive("views.flip", 0.0, "a mirrored character is another one")
    if size / 0.875 > side:
        recipe.derive("data.crop_fraction", 1.0, f"{side} pixels: there is no border to crop")


def _choose_batch(recipe: Rules, images: int, machine: Machine) -> None:
    found, rule = batch_size(images, machine.cuda), f"a power of two, for {images:,} images"
    if found < 128:
        rule += f": about {LEAST_UPDATES} updates an epoch"
    if machine.memory_bytes is not None:
        (width, depth, side), mae = _sizes(recipe), recipe.config.mae
        sizes, decoder = (width, depth), (mae.decoder.width, mae.decoder.depth)
        visible = round(side**2 * (1 - mae.mask_ratio))
        if recipe.config.objective == "simmim":
            visible, decoder = side**2, (0, 0)
        fits = machine.processes * fitting_batch(machine.memory_bytes, side**2, visible, sizes, decoder)
        if fits < found:
            found, rule = fits, f"a power of two whose activations take half of {machine.memory_bytes / 2**30:.0f} GiB"
    recipe.derive("batch_size", max(2, found), rule)
    if found < recipe.config.batch_size and recipe.config.batch_size * LEAST_UPDATES > images:
        recipe.adapt(
            "batch_size", found, f"an epoch of {images:,} images would have fewer than {LEAST_UPDATES} updates"
        )


def _choose_rate(recipe: Rules) -> None:
    batch, (width, _, _) = recipe.config.batch_size, _sizes(recipe)
    section, is_mae = recipe.config.objective, recipe.config.objective == "mae"
    rule = f"{'MAE' if is_mae else 'SimMIM'}'s, scaled so its product with the batch follows the root of {batch} images"
    rule += f", and is higher for a width of {width}" if width < PAPER_WIDTH else ""
    recipe.derive(f"{section}.lr", base_rate(batch, width) if is_mae else simmim_rate(batch, width), rule)
    if (before := recipe.before("batch_size")) is not None:
        rate = two_digits(recipe.config.masking.lr * (before / batch) ** 0.5)
        recipe.adapt(f"{section}.lr", rate, "its product with the batch follows the root of the batch")


def _derive_schedule(recipe: Rules, images: int, machine: Machine) -> None:
    (_, _, side), section = _sizes(recipe), recipe.config.objective
    most = CPU_PATCHES if section == "mae" else SIMMIM_CPU_PATCHES
    rule = f"as {'MAE' if section == 'mae' else 'SimMIM'}'s 800 for ImageNet, 1600 below 100,000 images"
    if not machine.cuda:
        rule = f"{most // 10**6} million patches, {side**2} per image: 20 minutes on a core; at most 400"
    recipe.derive(f"{section}.epochs", epochs(images, side**2, machine.cuda, most), rule)
    chosen = recipe.config.masking.epochs
    rule = f"5% of {chosen} epochs, as MAE's 40 of 800"
    recipe.derive(f"{section}.warmup_epochs", two_digits(chosen / 20), rule)
    if recipe.config.masking.warmup_epochs > chosen:
        recipe.adapt(f"{section}.warmup_epochs", two_digits(chosen / 20), rule)
    recipe.derive("monitor.knn_every_epochs", max(1, chosen // 20), "about 20 checks in the run")
    if not machine.cuda:
        recipe.derive("monitor.knn_samples", 2000, "a check should take seconds on a CPU")
