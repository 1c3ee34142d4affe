import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from mimref.encoders.masking import draw_mask, in_squares
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.pretraining.simmim import SimMIM
from tests.test_pretraining_mae import patches_by_loops

PATCH, SIDE, WIDTH, HEADS = 4, 16, 32, 2
PATCHES = (SIDE // PATCH) ** 2


def model_of(mask_ratio: float = 0.6, *, side: int = SIDE, channels: int = 3) -> SimMIM:
    torch.manual_seed(0)
    sizes = Architecture("custom", side, WIDTH, 2, HEADS, PATCH, fixed_positions=False, channels=channels)
    return SimMIM(build_encoder(sizes), mask_ratio)


def images_and_noise(count: int = 3, *, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return images, torch.rand(count, PATCHES, generator=generator)


def predict_by_hand(model: SimMIM, patches_NC: NDArray[np.float64], hidden: list[int]) -> Tensor:
    """Return the pixels (N, C) of one image; of the encoder's modules, only linear layers and LayerNorms are called."""
    vit, decoder = model.encoder.vit, model.decoder
    # Values of patches are ordered row, column, channel; weights of the projection channel, row, column.
    channels = patches_NC.shape[1] // PATCH**2
    ordered = torch.from_numpy(patches_NC).reshape(PATCHES, PATCH, PATCH, channels).permute(0, 3, 1, 2).flatten(1)
    weight = vit.patch_embed.proj.weight.flatten(1)
    rows = []
    for number in range(PATCHES):
        seen = weight @ ordered[number] + vit.patch_embed.proj.bias
        rows.append(decoder.mask_token if number in hidden else seen)
    assert vit.pos_embed is not None and vit.cls_token is not None
    tokens = torch.stack([vit.cls_token[0, 0], *rows]) + vit.pos_embed[0]
    for block in vit.blocks:
        query, key, value = block.attn.qkv(block.norm1(tokens)).reshape(1 + PATCHES, 3, HEADS, -1).permute(1, 2, 0, 3)
        mixed = scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        tokens = tokens + block.attn.proj(mixed)
        tokens = tokens + block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(tokens))))
    return torch.stack([decoder.predict.weight @ token + decoder.predict.bias for token in vit.norm(tokens)[1:]])


def loss_by_hand(model: SimMIM, images: Tensor, noise: Tensor, num_hidden: int) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    patches = patches_by_loops(images.numpy(), PATCH)
    for image in range(len(images)):
        ranked = sorted(range(PATCHES), key=lambda patch, image=image: float(noise[image, patch]))  # type: ignore[misc]
        hidden = ranked[PATCHES - num_hidden :]
        pixels = predict_by_hand(model, patches[image], hidden)
        for patch in hidden:
            target = patches[image, patch]
            target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
            total = total + (pixels[patch] - torch.from_numpy(target)).square().mean()
            count += 1
    assert count == num_hidden * len(images)
    return total / count


@pytest.mark.parametrize("channels", [3, 4])
def test_loss_and_gradient_equal_plain_loops(channels: int) -> None:
    model = model_of(channels=channels).double()
    images, noise = images_and_noise(channels=channels)
    with torch.no_grad():  # a mask token as large as the embeddings
        model.decoder.mask_token.normal_()
    loss = model(images, noise)
    expected = loss_by_hand(model, images, noise, num_hidden=10)
    # The model converts pixels to float32 before it subtracts them.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(model.parameters())
    found = torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
    wanted = torch.cat([each.flatten() for each in torch.autograd.grad(expected, parameters)])
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    assert all(each.requires_grad for each in parameters)


@pytest.mark.parametrize(("side", "size"), [(4, 2), (7, 2), (7, 3), (5, 1), (4, 9)])
def test_hidden_patches_lie_in_squares(side: int, size: int) -> None:
    noise = torch.rand(20, side * side, generator=torch.Generator().manual_seed(side))
    for number_visible in (1, side, side * side // 2):
        hidden_BN = draw_mask(in_squares(noise, size), number_visible).hidden_BN
        for row, hidden in zip(noise.tolist(), hidden_BN.tolist(), strict=True):
            squares: dict[tuple[int, int], list[int]] = {}
            for patch in range(side * side):
                squares.setdefault((patch // side // size, patch % side // size), []).append(patch)
            # The first patch of a square is the one in its upper left corner.
            ordered = sorted(squares.values(), key=lambda patches, row=row: row[patches[0]])  # type: ignore[misc]
            shown = [patch for patches in ordered for patch in sorted(patches, key=row.__getitem__)][:number_visible]
            assert [patch for patch in range(side * side) if not hidden[patch]] == sorted(shown)


def test_squares_of_one_patch_change_nothing() -> None:
    model, other = model_of().double(), model_of().double()
    other.mask_size = 2
    images, noise = images_and_noise()
    assert model.mask_size == 1
    torch.testing.assert_close(draw_mask(in_squares(noise, 1), 6).hidden_BN, draw_mask(noise, 6).hidden_BN)
    assert model(images, noise) != other(images, noise)
    torch.testing.assert_close(other(images, noise), model(images, in_squares(noise, 2)))


def hide(images: Tensor, hidden_BN: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the images with changed pixels in hidden patches."""
    pixels = hidden_BN.reshape(-1, 1, SIDE // PATCH, SIDE // PATCH)
    pixels = pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.where(pixels, change(images), images)


def test_the_encoder_does_not_see_hidden_pixels() -> None:
    model = model_of().double()
    images, noise = images_and_noise()
    hidden_BN = noise.argsort(dim=1).argsort(dim=1) >= 6
    changed = hide(images, hidden_BN, lambda images: torch.randn_like(images) * 100)
    with torch.no_grad():
        tokens = model.encode_masked(images, hidden_BN)
        assert tokens.shape == (3, PATCHES, WIDTH)
        assert torch.equal(model.encode_masked(changed, hidden_BN), tokens)
        # Only the target changes; scaling and shifting the hidden patches changes nothing.
        assert model(changed, noise) != model(images, noise)
        scaled = hide(images, hidden_BN, lambda images: 3 * images + 1)
        torch.testing.assert_close(model(scaled, noise), model(images, noise), rtol=1e-5, atol=0)
        # Every visible patch matters, and no hidden one.
        for patch in range(PATCHES):
            other = images.clone()
            other[0, 0, patch // 4 * PATCH, patch % 4 * PATCH] += 1
            same = torch.equal(model.encode_masked(other, hidden_BN)[0], tokens[0])
            assert same == bool(hidden_BN[0, patch])


def test_without_hidden_patches_the_tokens_are_the_encoders_own() -> None:
    model = model_of().double()
    images, _ = images_and_noise()
    with torch.no_grad():
        shown = model.encode_masked(images, torch.zeros(3, PATCHES))
        assert torch.equal(shown, model.encoder.blocks(images, [2], final_norm=True)[0][:, 1:])


def test_the_mask_token_stands_before_positions() -> None:
    encoder, token = model_of().encoder, torch.randn(WIDTH)
    hidden_BN = torch.ones(1, PATCHES, dtype=torch.bool)
    embedded = encoder.embed(torch.randn(1, 3, SIDE, SIDE), masked=(hidden_BN, token))
    assert torch.equal(embedded[0, 1:], token + sincos_positions(WIDTH, 4)[0, 1:])


def test_weights_start_as_maes_and_all_are_trained() -> None:
    model = model_of()
    assert model.encoder.vit.pos_embed is not None
    assert torch.equal(model.encoder.vit.pos_embed, sincos_positions(WIDTH, 4))
    limit = math.sqrt(6 / (WIDTH + 48))
    for weight in (model.encoder.vit.patch_embed.proj.weight, model.decoder.predict.weight):
        assert 0.9 * limit < weight.abs().max() <= limit
    assert (model.decoder.predict.bias == 0).all()
    assert 0.01 < model.decoder.mask_token.std() < 0.03
    images, noise = images_and_noise()
    model(images.float(), noise).backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in model.parameters())


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 10), (0.75, 12), (0.01, 1), (0.999, 15)])
def test_number_of_hidden_patches(ratio: float, hidden: int) -> None:
    assert PATCHES - model_of(ratio).num_visible == hidden


def test_one_patch_cannot_be_masked() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.image_size 4 is one patch"):
        model_of(side=4)
