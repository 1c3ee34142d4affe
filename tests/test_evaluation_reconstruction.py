"""Decoders trained together, against decoders trained alone and a plain loop; the encoder does not change."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimref.config.base import DataConfig
from mimref.config.run import DecoderConfig
from mimref.data.open import open_source
from mimref.data.sources import ArraySource, ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import Photometric
from mimref.draws import Operation, uniform
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.masking import MAEDecoder, draw_mask, normalize_patches, patchify
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import ConfigError, DataError, DivergenceError
from mimref.evaluation.blocks.config import ReconstructionConfig
from mimref.evaluation.blocks.reconstruction import DecodersJob, Reconstruction, few_updates, reconstruct_blocks
from mimref.features.encode import PassSettings
from mimref.progress import Silent
from mimref.results import Row
from mimref.training.job import train
from tests.tiny import write_images, write_unlabelled

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16, crop_fraction=1.0)
READING = PassSettings(TRANSFORM, CPU)
SIZES: dict[str, Any] = {"image_size": 16, "width": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
SETTINGS = ReconstructionConfig(
    epochs=3, warmup_epochs=1, batch_size=8, lr=0.1, decoder=DecoderConfig(width=16, depth=2, num_heads=2)
)


def build(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(Architecture("custom", **SIZES | changes))


def images(count: int, seed: int) -> ArraySource:
    """Stripes of random slope and width, without labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16]
    slope, scale = rng.uniform(-2, 2, (2, count, 1, 1)), rng.uniform(0.3, 1, (count, 1, 1))
    waves = np.sin(scale * (x * slope[0] + y * slope[1]))
    return ArraySource("stripes", (127 + 127 * waves).astype(np.uint8), None, None, "train", np.arange(count))


TRAIN, VAL = images(24, 0), images(10, 1)


def run(encoder: Encoder, **changes: Any) -> Reconstruction:
    reading = replace(READING, precision=changes.pop("precision", torch.float32))
    return reconstruct_blocks(encoder, TRAIN, VAL, reading, changes.pop("settings", SETTINGS), **changes)


def losses(rows: list[Row], metric: str = "block_reconstruction") -> dict[int, float]:
    return {int(row["block"]): float(row["value"]) for row in rows if row["metric"] == metric}


def digest(encoder: Encoder) -> str:
    found = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def reference() -> Reconstruction:
    """All blocks, with `SETTINGS` unchanged."""
    return run(build())


def test_trained_together_equals_trained_alone(reference: Reconstruction) -> None:
    encoder, together = build(), reference
    found = losses(together.rows)
    assert list(found) == [1, 2, 3] and len(set(found.values())) == 3
    for block in (1, 3):
        alone = DecodersJob(encoder.eval(), READING, SETTINGS, [block], 0, len(TRAIN))
        train(alone, alone.batches(TRAIN), Silent())
        assert alone.evaluate(VAL, lambda done: None) == [pytest.approx(found[block], rel=1e-6)]
        for left, right in zip(alone.decoders[0].parameters(), together.decoders[block - 1].parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_encoder_does_not_change() -> None:
    encoder = build()
    trained = [parameter.requires_grad for parameter in encoder.parameters()]
    before = digest(encoder)
    run(encoder)
    assert digest(encoder) == before
    assert [parameter.requires_grad for parameter in encoder.parameters()] == trained
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_one_pass_of_the_encoder_per_batch() -> None:
    encoder = build()
    passes = [0] * 3

    def count(number: int) -> Any:
        def hook(module: object, args: tuple[Tensor], output: Tensor) -> None:
            passes[number] += 1
            assert args[0].shape[1] == 1 + 4 and not output.requires_grad and not encoder.training

        return hook

    for number, block in enumerate(encoder.vit.blocks):
        block.register_forward_hook(count(number))
    seen: list[tuple[int, int]] = []
    run(encoder.train(), progress=lambda done, total: seen.append((done, total)))
    assert passes == [9 + 2] * 3  # 3 epochs of 3 batches, and 2 batches of validation images
    assert seen == [(done, 11) for done in range(1, 12)]


ENCODERS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"post_norm": True},
    "no CLS": {"class_token": False},
    "registers": {"registers": 2},
    "no norm": {"final_norm": False},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_of_every_block(kind: str) -> None:
    """The visible patches pass through the encoder's own blocks, one after the other."""
    encoder = build(**ENCODERS[kind]).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = torch.randn(2, 3, 16, 16)
    visible_BK = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    with torch.no_grad():
        found = encoder.blocks(batch, [1, 2, 3], visible_BK=visible_BK)
        normed = encoder.blocks(batch, [3, 1], final_norm=True, visible_BK=visible_BK)
        for image in range(2):
            whole = encoder.embed(batch[image : image + 1])
            prefix = encoder.num_prefix_tokens
            rows = [*range(prefix), *(prefix + int(patch) for patch in visible_BK[image])]
            tokens = whole[:, rows]
            for number, block in enumerate(encoder.vit.blocks):
                tokens = block(tokens)
                torch.testing.assert_close(found[number][image], tokens[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(normed[0][image], encoder.vit.norm(tokens)[0], rtol=0, atol=1e-5)
    assert torch.equal(normed[1], found[0])
    with pytest.raises(ConfigError, match="block 4 does not exist"):
        encoder.blocks(batch, [4], visible_BK=visible_BK)


@pytest.mark.parametrize("kind", list(ENCODERS)[1:])
def test_every_kind_of_encoder(kind: str) -> None:
    short = SETTINGS.model_copy(update={"epochs": 1})
    found = losses(run(build(**ENCODERS[kind]), settings=short).rows)
    assert list(found) == [1, 2, 3]
    assert all(0 < loss < 2 for loss in found.values())


def test_reported_loss_equals_a_plain_loop() -> None:
    encoder = build()
    found = run(encoder, seed=3)
    encoder.eval()
    total, count = [0.0] * 3, 0
    for index in range(10):
        image = TRANSFORM.normalize(TRANSFORM.crop(VAL.read(index))[None])
        noise = uniform(3, 0, Operation.MASK, torch.tensor([index]), 1, count=16)[0].tolist()
        ranked = sorted(range(16), key=lambda patch: noise[patch])
        mask = draw_mask(torch.tensor([noise]), 4)
        assert mask.visible_BK[0].tolist() == ranked[:4]
        target = normalize_patches(patchify(image, 4))[0]
        with torch.no_grad():
            tokens = encoder.blocks(image, [1, 2, 3], visible_BK=mask.visible_BK)
            for number, decoder in enumerate(found.decoders):
                pixels = decoder(tokens[number], mask.restore_BN)[0]
                total[number] += sum(float(((pixels[patch] - target[patch]) ** 2).mean()) for patch in ranked[4:])
        count += 12
    assert list(losses(found.rows).values()) == pytest.approx([value / count for value in total], rel=1e-5)


def plain_decoder(decoder: MAEDecoder, tokens_LD: Tensor, restore_N: Tensor) -> Tensor:
    """Pixels (N, C) of one image: LayerNorm and embedding row by row, then timm's blocks."""
    rows = []
    for token in tokens_LD:
        centred = token - token.mean()
        norm = decoder.input_norm
        assert isinstance(norm, nn.LayerNorm)
        rows.append(decoder.embed(norm.weight * centred / (centred.square().mean() + 1e-5).sqrt() + norm.bias))
    shown, mask = rows[decoder.num_prefix :], decoder.mask_token[0, 0]
    places = [shown[place] if place < len(shown) else mask for place in restore_N.tolist()]
    tokens = torch.stack(rows[: decoder.num_prefix] + places)[None] + decoder.positions
    pixels: Tensor = decoder.predict(decoder.norm(decoder.blocks(tokens)))[0, decoder.num_prefix :]
    return pixels


@pytest.mark.parametrize("micro_batch", [100, 3])
def test_losses_and_gradients_equal_a_plain_loop(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoder has its own LayerNorm on the raw output of its block, including the last block."""
    encoder = build().double().eval()
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    settings = SETTINGS.model_copy(update={"micro_batch": micro_batch})
    job = DecodersJob(encoder, READING, settings, [1, 3], 0, len(TRAIN))
    torch.manual_seed(1)
    for decoder in job.decoders:
        decoder.double()
        for parameter in decoder.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch = next(iter(job.batches(TRAIN)))
    photometric = Photometric(job.views, 0, CPU, mean=TRANSFORM.mean, std=TRANSFORM.std)
    monkeypatch.setattr(job, "photometric", lambda *args: [view.double() for view in photometric(*args)])
    found = job.forward_backward(batch, len(batch.sample_B))
    expected = torch.zeros(2, dtype=torch.float64)
    views = photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0].double()
    gradients = []
    for number, block in enumerate((1, 3)):
        total = torch.zeros((), dtype=torch.float64)
        for image, sample in zip(views, batch.sample_B.tolist(), strict=True):
            noise = uniform(0, batch.epoch, Operation.MASK, torch.tensor([sample]), 0, count=16)
            mask = draw_mask(noise, 4)
            with torch.no_grad():
                tokens = encoder.embed(image[None], mask.visible_BK)
                for layer in encoder.vit.blocks[:block]:
                    tokens = layer(tokens)
            pixels = plain_decoder(job.decoders[number], tokens[0], mask.restore_BN[0])
            target = normalize_patches(patchify(image[None], 4))[0]
            hidden = [patch for patch in range(16) if patch not in mask.visible_BK[0].tolist()]
            total = total + torch.stack([(pixels[patch] - target[patch]).square().mean() for patch in hidden]).mean()
        expected[number] = (loss := total / len(views)).detach()
        gradients.append(torch.autograd.grad(loss, list(job.decoders[number].parameters())))
    torch.testing.assert_close(job.seen.double(), expected, rtol=1e-6, atol=0)
    assert float(found) == pytest.approx(float(expected.sum()), rel=1e-6)
    for decoder, own in zip(job.decoders, gradients, strict=True):
        assert {name.split(".")[0] for name, _ in decoder.named_parameters()} >= {"input_norm", "embed"}
        scale = torch.stack([gradient.norm() for gradient in own]).norm()
        for parameter, gradient in zip(decoder.parameters(), own, strict=True):
            assert parameter.grad is not None
            assert float((parameter.grad - gradient).norm()) < 1e-6 * float(scale)


def test_larger_tokens_give_the_same_loss(reference: Reconstruction) -> None:
    """A block that multiplies its input by ten does not change the loss."""
    encoder = build()

    def enlarge(module: object, args: tuple[Tensor], output: Tensor) -> Tensor:
        return 10 * args[0]

    encoder.vit.blocks[2].register_forward_hook(enlarge)
    found = losses(run(encoder).rows)
    assert found[3] == pytest.approx(found[2], rel=1e-3) and found[2] == pytest.approx(losses(reference.rows)[2])


def test_micro_batches_change_nothing_but_rounding(reference: Reconstruction) -> None:
    small = run(build(), settings=SETTINGS.model_copy(update={"micro_batch": 3}))
    assert list(losses(small.rows).values()) == pytest.approx(list(losses(reference.rows).values()), rel=1e-3)


def test_advice_for_few_updates() -> None:
    """The paper uses MAE's batch size (Appendix C.2) and a learning rate of 1.5e-4 per 256 images."""
    paper = ReconstructionConfig()
    assert (paper.batch_size, paper.lr, paper.epochs, paper.warmup_epochs) == (4096, 1.5e-4, 20, 5)
    assert few_updates(paper, 1_281_167) is None and few_updates(paper, 10 * 4096) is None
    advice = few_updates(paper, 1437)
    assert advice is not None and "20 updates in 20 epochs" in advice and "reconstruction.batch_size is 4096" in advice
    assert "71 or less" in advice


def test_training_lowers_the_loss() -> None:
    encoder = build()
    short, long = (
        losses(run(encoder, settings=SETTINGS.model_copy(update={"epochs": epochs})).rows) for epochs in (1, 8)
    )
    assert all(long[block] < short[block] for block in (1, 2, 3))


def test_deterministic_in_the_seed_alone(reference: Reconstruction) -> None:
    encoder = build()
    torch.manual_seed(1)
    assert run(encoder).rows == reference.rows
    assert torch.initial_seed() == 1  # the program's own generator is not touched
    assert run(encoder, seed=1).rows != reference.rows


def test_rows(reference: Reconstruction) -> None:
    rows = reference.rows
    found = losses(rows)
    assert rows[0] == {"metric": "block_reconstruction", "value": found[1], "block": 1, "epochs": 3}
    gains = [found[1] - found[2], found[2] - found[3]]
    scale = max(gains) if max(gains) > 0 else max(map(abs, gains))
    deltas = losses(rows, "block_reconstruction_delta")
    assert list(deltas) == [2, 3]
    assert list(deltas.values()) == pytest.approx([gain / scale for gain in gains])


def test_bfloat16_is_near(reference: Reconstruction) -> None:
    exact, rough = losses(reference.rows), losses(run(build(), precision=torch.bfloat16).rows)
    assert list(rough.values()) == pytest.approx(list(exact.values()), rel=0.05)


def sources(folder: Path) -> tuple[ImageSource, ImageSource]:
    data = DataConfig(spec=str(folder))
    return open_source(data, "train"), open_source(data, "val")


def test_unreadable_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path, per_class=20, classes=("",))
    (tmp_path / "004.png").write_bytes(b"no image")
    images, val = sources(folder)
    found = reconstruct_blocks(build(), images, val, READING, SETTINGS)
    assert [Path(path).name for path, _ in found.bad] == ["004.png"]
    with pytest.raises(DataError, match=r"1 image could not be read, more than data\.max_bad=0: .*004\.png"):
        reconstruct_blocks(build(), images, val, replace(READING, max_bad=0), SETTINGS)


def test_workers_change_nothing(tmp_path: Path) -> None:
    images, val = sources(write_unlabelled(tmp_path))
    alone, helped = (
        reconstruct_blocks(build(), images, val, replace(READING, workers=workers), SETTINGS).rows for workers in (0, 2)
    )
    assert alone == helped


def test_a_batch_holds_no_more_than_all_images() -> None:
    short = SETTINGS.model_copy(update={"epochs": 1})
    found, expected = (
        run(build(), settings=short.model_copy(update={"batch_size": size})).rows for size in (1000, len(TRAIN))
    )
    assert found == expected


def test_settings_that_do_not_fit() -> None:
    encoder = build()
    with pytest.raises(ConfigError, match="the image size 18 is not divisible by the patch size 4"):
        reconstruct_blocks(encoder, TRAIN, VAL, replace(READING, transform=EvalTransform(18)), SETTINGS)
    with pytest.raises(ConfigError, match="images of 4 pixels are a single patch"):
        reconstruct_blocks(encoder, TRAIN, VAL, replace(READING, transform=EvalTransform(4)), SETTINGS)


def test_other_resolutions_than_the_encoders_own() -> None:
    found = reconstruct_blocks(build(), TRAIN, VAL, replace(READING, transform=EvalTransform(24)), SETTINGS)
    assert all(math.isfinite(loss) for loss in losses(found.rows).values())


def test_encoders_without_patch_tokens_are_refused() -> None:
    backbone = TimmBackbone(BackboneArchitecture("test_convnext", 64))
    with pytest.raises(ConfigError, match="test_convnext is not a plain vision transformer"):
        reconstruct_blocks(backbone, TRAIN, VAL, replace(READING, transform=EvalTransform(64)), SETTINGS)


def test_broken_encoder() -> None:
    encoder = build()
    encoder.vit.blocks[1].mlp.fc2.weight.data.fill_(math.nan)
    with pytest.raises(DivergenceError, match="reconstruction loss of block 2 is not finite in epoch 1"):
        run(encoder)
