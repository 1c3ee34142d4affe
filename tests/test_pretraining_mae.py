import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mimref.config.run import DecoderConfig
from mimref.encoders.masking import normalize_patches, patchify
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.pretraining.mae import MaskedAutoencoder

PATCH, SIDE = 4, 16
PATCHES = (SIDE // PATCH) ** 2
WIDTH = 32


def autoencoder(
    mask_ratio: float = 0.75, *, side: int = SIDE, patch: int = PATCH, decoder_width: int = 16
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder(Architecture("custom", side, WIDTH, depth=2, num_heads=2, patch_size=patch))
    return MaskedAutoencoder(encoder, DecoderConfig(width=decoder_width, depth=1, num_heads=2), mask_ratio)


def images_and_noise(count: int = 3, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=dtype)
    return images, torch.rand(count, PATCHES, generator=generator)


def unpatchify(patches_BNP: Tensor, patch: int) -> Tensor:
    batch, count, _ = patches_BNP.shape
    grid = math.isqrt(count)
    images = torch.empty(batch, 3, grid * patch, grid * patch)
    for number in range(count):
        top, left = number // grid * patch, number % grid * patch
        pixels = patches_BNP[:, number].reshape(batch, patch, patch, 3)
        images[:, :, top : top + patch, left : left + patch] = pixels.permute(0, 3, 1, 2)
    return images


def patches_by_loops(images: NDArray[np.float64], patch: int) -> NDArray[np.float64]:
    batch, channels, side, _ = images.shape
    grid = side // patch
    patches = np.empty((batch, grid * grid, patch * patch * channels))
    for image in range(batch):
        for row in range(grid):
            for column in range(grid):
                values = [
                    images[image, channel, row * patch + y, column * patch + x]
                    for y in range(patch)
                    for x in range(patch)
                    for channel in range(channels)
                ]
                patches[image, row * grid + column] = values
    return patches


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (12, 4), (9, 3), (4, 4), (4, 1)])
def test_patchify(side: int, patch: int) -> None:
    images = torch.randn(2, 3, side, side)
    patches = patchify(images, patch)
    assert patches.shape == (2, (side // patch) ** 2, 3 * patch**2)
    np.testing.assert_array_equal(patches.double().numpy(), patches_by_loops(images.double().numpy(), patch))
    assert torch.equal(unpatchify(patches, patch), images)


def test_normalize_patches() -> None:
    patches = torch.randn(2, 5, 12, dtype=torch.float64) * 3 + 7
    patches[0, 0] = 0.25  # flat: only the mean to subtract
    values = patches.numpy()
    mean = values.mean(axis=2, keepdims=True)
    expected = (values - mean) / np.sqrt(values.var(axis=2, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalize_patches(patches).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert (normalize_patches(patches)[0, 0] == 0).all()


def decode_by_hand(model: MaskedAutoencoder, visible: Tensor, shown: list[int]) -> Tensor:
    """Return the pixels (N, P) of one image; visible: (1, 1 + K, D), CLS and the tokens of the patches `shown`."""
    decoder = model.decoder
    embedded = decoder.embed(visible)[0]
    rows = [embedded[0]]
    for patch in range(PATCHES):
        rows.append(embedded[1 + shown.index(patch)] if patch in shown else decoder.mask_token[0, 0])
    tokens = torch.stack(rows) + sincos_positions(16, SIDE // PATCH)[0].double()
    for block in decoder.blocks:
        tokens = block(tokens[None])[0]
    pixels: Tensor = decoder.predict(decoder.norm(tokens))[1:]
    return pixels


def test_loss_is_the_mean_over_hidden_patches() -> None:
    model = autoencoder().double()
    images, noise = images_and_noise(dtype=torch.float64)
    with torch.no_grad():
        got = float(model(images, noise))
        total, count = 0.0, 0
        patches = patches_by_loops(images.numpy(), PATCH)
        for image in range(len(images)):
            ranked = sorted(range(PATCHES), key=lambda patch, image=image: float(noise[image, patch]))  # type: ignore[misc]
            shown, hidden = ranked[:4], ranked[4:]
            tokens = model.encoder.embed(images[image : image + 1])[:, 1:]
            sequence = torch.cat([model.encoder.vit.cls_token, tokens[:, shown]], dim=1)  # type: ignore[list-item]
            for block in model.encoder.vit.blocks:
                sequence = block(sequence)
            pixels = decode_by_hand(model, model.encoder.vit.norm(sequence), shown).numpy()
            for patch in hidden:
                target = patches[image, patch]
                target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
                total += float(((pixels[patch] - target) ** 2).mean())
                count += 1
    assert count == 3 * 12
    # The model converts pixels to float32 before it subtracts them.
    assert got == pytest.approx(total / count, rel=1e-6)


def test_gradients_come_from_hidden_patches_alone() -> None:
    model = autoencoder()
    images, noise = images_and_noise()
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.decoder.register_forward_hook(keep)
    model(images, noise).backward()
    shown_BN = noise.argsort(dim=1).argsort(dim=1) < 4
    gradient_BN = seen[0].grad.abs().amax(dim=2)  # type: ignore[union-attr]
    assert (gradient_BN[shown_BN] == 0).all()
    assert (gradient_BN[~shown_BN] > 0).all()


@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.8, 3), (0.9, 1), (0.99, 1), (0.01, 15), (1e-12, 15), (0.76, 3)]
)
def test_number_of_visible_patches(ratio: float, visible: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = autoencoder(ratio)
    assert model.num_visible == visible
    images, noise = images_and_noise()
    chosen: list[Tensor] = []
    encode = model.encode_visible

    def note(images: Tensor, visible_BK: Tensor) -> Tensor:
        chosen.append(visible_BK)
        return encode(images, visible_BK)

    monkeypatch.setattr(model, "encode_visible", note)
    assert torch.isfinite(model(images, noise))
    for image in range(3):
        smallest = np.argsort(noise[image].numpy())[:visible]
        assert chosen[0][image].tolist() == smallest.tolist()


def test_whole_numbers_of_visible_patches_survive_rounding() -> None:
    assert autoencoder(0.8, side=20, patch=2).num_visible == 20  # of 100; 100 * (1 - 0.8) is 19.999...
    assert autoencoder(0.9, side=20, patch=2).num_visible == 10
    assert autoencoder(0.75, side=28, patch=2).num_visible == 49


def test_encoder_sees_visible_patches_alone() -> None:
    model = autoencoder().eval()
    images, noise = images_and_noise()
    visible_BK = noise.argsort(dim=1)[:, :4]
    changed = images.clone()
    for image in range(3):
        for patch in range(PATCHES):
            if patch not in visible_BK[image].tolist():
                top, left = patch // 4 * PATCH, patch % 4 * PATCH
                changed[image, :, top : top + PATCH, left : left + PATCH] = 100.0
    with torch.no_grad():
        tokens = model.encode_visible(images, visible_BK)
        assert tokens.shape == (3, 5, WIDTH)
        assert torch.equal(model.encode_visible(changed, visible_BK), tokens)
        # Every visible patch matters.
        for place in range(4):
            other = images.clone()
            patch = int(visible_BK[0, place])
            other[0, :, patch // 4 * PATCH + 1, patch % 4 * PATCH + 2] += 1
            assert not torch.equal(model.encode_visible(other, visible_BK)[0], tokens[0])


def test_all_patches_in_order_give_the_encoders_own_output() -> None:
    model = autoencoder().eval()
    images, _ = images_and_noise()
    with torch.no_grad():
        tokens = model.encode_visible(images, torch.arange(PATCHES).expand(3, -1))
        whole = model.encoder.blocks(images, [2], final_norm=True)[0]
    torch.testing.assert_close(tokens, whole, rtol=0, atol=1e-5)


def test_decoder_puts_tokens_back_where_they_came_from() -> None:
    decoder = autoencoder(decoder_width=WIDTH).decoder
    for part in ("embed", "blocks", "norm", "predict"):
        setattr(decoder, part, nn.Identity())
    decoder.positions.zero_()
    order = torch.stack([torch.randperm(PATCHES) for _ in range(2)])
    # Token k of an image holds the number of the patch that it was cut from.
    visible = torch.full((2, 5, WIDTH), -5.0)
    visible[:, 1:] = order[:, :4, None].float()
    with torch.no_grad():
        decoder.mask_token.fill_(-1.0)
        restored = decoder(visible, order.argsort(dim=1))
    for image in range(2):
        for patch in range(PATCHES):
            expected = patch if patch in order[image, :4].tolist() else -1
            assert (restored[image, patch] == expected).all()


def test_gradients_reach_every_trained_parameter() -> None:
    model = autoencoder()
    images, noise = images_and_noise()
    model(images, noise).backward()
    assert model.decoder.mask_token.grad is not None
    assert model.decoder.mask_token.grad.abs().sum() > 0
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["encoder.vit.pos_embed"]


def test_positions_are_fixed() -> None:
    model = autoencoder()
    positions = model.encoder.vit.pos_embed
    assert positions is not None
    assert not positions.requires_grad
    assert torch.equal(positions, sincos_positions(WIDTH, 4))
    assert torch.equal(model.decoder.positions, sincos_positions(16, 4))
    assert "decoder.positions" not in dict(model.named_parameters())
    assert not any("decoder.positions" in name for name in model.state_dict())


def test_initialisation_is_maes() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(Architecture("custom", 16, 256, depth=1, num_heads=2, patch_size=4))
    model = MaskedAutoencoder(encoder, DecoderConfig(width=256, depth=1, num_heads=2), 0.75)
    checked = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert_uniform(module.weight, math.sqrt(6 / sum(module.weight.shape)))
            assert (module.bias == 0).all()
            checked += 1
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert checked == 4 + 4 + 2
    assert_uniform(encoder.vit.patch_embed.proj.weight, math.sqrt(6 / (256 + 3 * 4 * 4)))
    assert encoder.vit.cls_token is not None
    for token in (encoder.vit.cls_token.detach(), model.decoder.mask_token.detach()):
        assert float(token.std()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(token.mean())) < 0.005


def assert_uniform(weight: Tensor, bound: float) -> None:
    weight = weight.detach()
    assert float(weight.abs().max()) <= bound
    assert float(weight.abs().max()) > 0.99 * bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_a_few_steps_lower_the_loss_on_repeated_images() -> None:
    model = autoencoder()
    images, noise = images_and_noise()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9  # near the variance of normalised pixels
    assert losses[-1] < 0.6 * losses[0]  # 0.58 with PyTorch 2.6


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.image_size 16 is one patch"):
        autoencoder(side=16, patch=16)
