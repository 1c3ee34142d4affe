"""Heads trained together against heads trained alone with torch's own modules; schedules, losses and states."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.data.masks.sources import UNLABELLED, Coding, Pairs
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import build_encoder
from mimref.errors import ConfigError, OutputError
from mimref.features.encode import PassSettings
from mimref.transfer.segment.config import SegmentConfig, TrainingConfig, Upsampling
from mimref.transfer.segment.heads import HeadInput, HeadsTrainer, SegmentationHeads, pixel_gradients
from mimref.transfer.segment.linear import HeadsJob, schedule
from mimref.transfer.segment.run import _data
from mimref.transfer.segment.tokens import PatchTokens, head_inputs, paper_blocks
from tests.pairs import read_pair, write_pairs
from tests.test_data_masks import checked
from tests.tiny import ARCHITECTURE
from tests.watch import META, distant

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LRS = [0.01, 0.1, 0.5]
WIDTHS = [6, 10]
CLASSES, SIDE, SIZE = 4, 3, 12


def batches(count: int = 6) -> list[tuple[list[Tensor], Tensor]]:
    torch.manual_seed(0)
    return [
        (
            [torch.randn(5, SIDE**2, width, dtype=torch.float64) * 2 + 1 for width in WIDTHS],
            torch.randint(-1, CLASSES, (5, SIZE, SIZE), dtype=torch.int16),
        )
        for _ in range(count)
    ]


class Alone(nn.Module):
    """One head as described in papers: BatchNorm, a 1 x 1 convolution, upsampling."""

    def __init__(self, weight_CD: Tensor, *, affine: bool) -> None:
        super().__init__()
        width = weight_CD.shape[1]
        self.norm = nn.BatchNorm2d(width, affine=affine, dtype=torch.float64)
        self.conv = nn.Conv2d(width, CLASSES, 1, dtype=torch.float64)
        self.conv.weight.data.copy_(weight_CD[:, :, None, None])
        self.conv.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, x_BND: Tensor, upsampling: Upsampling) -> Tensor:
        x_BDhw = x_BND.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        scores: Tensor = self.conv(self.norm(x_BDhw))
        smooth = {"align_corners": False} if upsampling == "bilinear" else {}
        return F.interpolate(scores, size=(SIZE, SIZE), mode=upsampling, **smooth)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_together_equals_alone(optimizer: Literal["sgd", "adamw"], affine: bool, upsampling: Upsampling) -> None:
    heads = SegmentationHeads(WIDTHS, CLASSES, len(LRS), affine=affine, dtype=torch.float64)
    start = [weight.detach().clone() for weight in heads.weights]
    decay = 0.01 if optimizer == "adamw" else 0.0
    trainer = HeadsTrainer(heads, optimizer, LRS, weight_decay=decay, upsampling=upsampling)
    settings = TrainingConfig()
    made = batches()
    for update, (inputs, mask) in enumerate(made):
        trainer.step(inputs, mask, *schedule(update, len(made), settings))
    heads.eval()
    found = heads(made[0][0])
    assert len(heads) == 6 and heads.finite().all()
    for number in range(len(WIDTHS)):
        for row, lr in enumerate(LRS):
            assert torch.equal(start[number][row], start[number][0])
            alone = Alone(start[number][row], affine=affine)
            kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
            more = {"momentum": 0.9} if optimizer == "sgd" else {}
            own = kind(alone.parameters(), lr=lr, weight_decay=decay, **more)
            for update, (inputs, mask) in enumerate(made):
                scale, offset = schedule(update, len(made), settings)
                own.param_groups[0]["lr"] = lr * scale + offset
                own.zero_grad()
                F.cross_entropy(alone(inputs[number], upsampling), mask.long(), ignore_index=UNLABELLED).backward()
                own.step()
            torch.testing.assert_close(heads.weights[number][row], alone.conv.weight[:, :, 0, 0], **EXACT)
            torch.testing.assert_close(heads.biases[number][row], alone.conv.bias, **EXACT)
            if affine:
                torch.testing.assert_close(heads.scales[number][row], alone.norm.weight, **EXACT)
                torch.testing.assert_close(heads.shifts[number][row], alone.norm.bias, **EXACT)
            alone.eval()
            x_BDhw = made[0][0][number].transpose(1, 2).unflatten(2, (SIDE, SIDE))
            scores = alone.conv(alone.norm(x_BDhw)).flatten(2)
            torch.testing.assert_close(found[number][row].transpose(0, 1), scores, **EXACT)


def test_the_loss_in_parts_and_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    (inputs, mask), *_ = batches(1)
    heads = SegmentationHeads(WIDTHS, CLASSES, len(LRS), dtype=torch.float64)
    scores = heads(inputs)[0].detach()
    whole = pixel_gradients(scores, mask, "bilinear")
    monkeypatch.setattr("mimref.transfer.segment.heads.PIXEL_ELEMENTS", 1)
    torch.testing.assert_close(pixel_gradients(scores, mask, "bilinear"), whole, **EXACT)
    assert not pixel_gradients(scores, torch.full_like(mask, UNLABELLED), "bilinear").any()


def test_a_diverged_head_leaves_the_others_alone() -> None:
    tame, wild = (SegmentationHeads(WIDTHS, CLASSES, 2, dtype=torch.float64) for _ in range(2))
    for heads, rate in ((tame, 0.2), (wild, math.inf)):
        trainer = HeadsTrainer(heads, "sgd", [0.1, rate])
        for inputs, mask in batches():
            trainer.step(inputs, mask, 1.0)
    assert wild.finite().tolist() == [True, False] * 2
    for ours, theirs in zip(wild.weights, tame.weights, strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_schedules() -> None:
    cosine, linear = TrainingConfig(), load_config(SegmentConfig, overrides={"protocol": "dinov2"}).training
    rates = [0.5 * scale + offset for scale, offset in (schedule(update, 105, cosine) for update in range(106))]
    assert rates[:11] == pytest.approx([0.5 * share / 11 for share in range(1, 12)])
    assert rates[50] == pytest.approx(1e-6 + (0.5 - 1e-6) * (1 + math.cos(math.pi * 40 / 95)) / 2)
    assert rates[105] == pytest.approx(1e-6)
    assert linear.warmup * 40_000 == 1500 and linear.updates == 40_000
    for update in (0, 1, 750, 1499, 1500, 20_000, 39_999):
        # mmcv's PolyLrUpdaterHook and its warm-up.
        regular = 1e-3 * (1 - update / 40_000)
        warm = regular * (1 - (1 - update / 1500) * (1 - 1e-6)) if update < 1500 else regular
        scale, offset = schedule(update, 40_000, linear)
        assert offset == 0 and 1e-3 * scale == pytest.approx(warm, rel=1e-12)


def test_which_blocks() -> None:
    assert paper_blocks(24) == (12, 16, 20, 24) and paper_blocks(32) == (20, 24, 28, 32)
    assert paper_blocks(13) == (1, 5, 9, 13) and paper_blocks(12) == (3, 6, 9, 12)
    assert paper_blocks(8) == (2, 4, 6, 8) and paper_blocks(2) == (1, 2) and paper_blocks(1) == (1,)
    config = load_config(SegmentConfig)
    blocks = (12, 16, 20, 24)
    assert head_inputs(config, 24, True) == [HeadInput(blocks), HeadInput(blocks, "patch+cls")]
    assert head_inputs(config, 24, False) == [HeadInput(blocks)]
    for protocol in ("dinov2", "knn"):
        own = load_config(SegmentConfig, overrides={"protocol": protocol})
        assert head_inputs(own, 24, True) == [HeadInput((24,))] and own.final_norm
    every = load_config(SegmentConfig, overrides={"blocks": "all"})
    assert head_inputs(every, 3, True) == [HeadInput((block,)) for block in (1, 2, 3)]
    raw = load_config(SegmentConfig, overrides={"blocks": "0,all"})
    assert head_inputs(raw, 2, True) == [HeadInput((block,)) for block in (0, 1, 2)]
    assert head_inputs(load_config(SegmentConfig, overrides={"blocks": "0"}), 2, True) == [HeadInput((0,))]
    with pytest.raises(ConfigError, match="last4"):
        head_inputs(load_config(SegmentConfig, overrides={"blocks": "last4"}), 24, True)


def test_inputs_of_heads() -> None:
    torch.manual_seed(0)
    of_block = {block: torch.randn(2, 5, 3) for block in (2, 4)}
    found = HeadInput((2, 4), "patch+cls").tokens(of_block, 1)
    for image in range(2):
        for patch in range(4):
            parts = [of_block[2][image, 1 + patch], of_block[2][image, 0]]
            parts += [of_block[4][image, 1 + patch], of_block[4][image, 0]]
            assert torch.equal(found[image, patch], torch.cat(parts))


def test_raw_pixels() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    encoder = build_encoder(ARCHITECTURE).eval()
    reading = PassSettings(EvalTransform(16, 1.0), torch.device("cpu"))
    tokens = PatchTokens(encoder, [HeadInput((0,)), HeadInput((3,))], reading, final_norm=False)
    raw, third = tokens(images)
    assert tokens.widths == [raw.shape[2], third.shape[2]] == [3 * 24 * 24, 32]
    assert torch.equal(third, encoder.blocks(images, [3])[0][:, 1:])
    padded = F.pad(images, [8] * 4)
    for patch in range(4):
        row, column = 8 * (patch // 2), 8 * (patch % 2)
        assert torch.equal(raw[:, patch], padded[:, :, row : row + 24, column : column + 24].flatten(1))


def test_images_are_decoded_as_the_header_records() -> None:
    header = {"data": {"spec": "digits", "orientation": "exif", "range": "0,4095"}}
    for spec in ("folder", None):
        found = _data(DataConfig(spec=spec), header)
        assert (found.spec, found.orientation, found.range) == (spec or "digits", "exif", "0,4095")
    assert _data(DataConfig(spec="folder", orientation="file"), header).orientation == "file"


# --- a job


def job(pairs: Pairs, state: Path | None = None, **settings: Any) -> HeadsJob:
    torch.manual_seed(0)
    encoder = build_encoder(ARCHITECTURE).eval()
    values = {"training.updates": 9, "training.batch_size": 4, "training.lr": [0.1, 1.0], **settings}
    config = load_config(SegmentConfig, overrides=values)
    reading = PassSettings(EvalTransform(16, 1.0), torch.device("cpu"), workers=0)
    tokens = PatchTokens(encoder, head_inputs(config, 4, True), reading, final_norm=config.final_norm)
    return HeadsJob(config, pairs, tokens, reading, state=state)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    pairs = checked(write_pairs(tmp_path / "data"))[0]["train"]
    for number, protocol in enumerate(("paper", "dinov2")):
        settings = {"protocol": protocol}
        whole = job(pairs, **settings)
        whole.run("weights", None)
        state = tmp_path / f"state{number}.pt"
        first = job(pairs, state, **settings)
        first.load(state, "weights")
        for _, batch in zip(range(5), first.batches(), strict=False):
            first.update(batch)
            first.step += 1
        first.save()
        second = job(pairs, state, **settings)
        second.run("weights", None)
        assert second.step == 9
        for name, value in whole.heads.state_dict().items():
            assert torch.equal(second.heads.state_dict()[name], value), name
        with pytest.raises(ConfigError, match="another seed"):
            job(pairs, state, **settings, seed=3).run("weights", None)
        with pytest.raises(ConfigError, match="set of images or encoder"):
            job(pairs, state, **settings).run("other weights", None)
        shifted = replace(pairs, masks=replace(pairs.masks, coding=Coding(first=1)))
        with pytest.raises(ConfigError, match="set of images or encoder"):
            job(shifted, state, **settings).run("weights", None)
        state.write_bytes(state.read_bytes()[:-100])
        with pytest.raises(OutputError, match="damaged state"):
            job(pairs, state, **settings).run("weights", None)


def test_updates_do_not_wait_for_the_device(tmp_path: Path) -> None:
    pairs = checked(write_pairs(tmp_path))[0]["train"]
    for protocol in ("paper", "dinov2"):
        near = job(pairs, protocol=protocol)
        batch = next(near.batches())
        far = HeadsJob(near.config, pairs, near.tokens, replace(near.reading, device=META), state=None)
        near.tokens.encoder.to(META)
        with distant() as noted:
            for _ in range(2):
                far.update(batch)
        assert noted.copied and not noted.waited and not noted.mixed


def test_heads_learn_colours(tmp_path: Path) -> None:
    pairs = checked(write_pairs(tmp_path))[0]["train"]
    trained = job(pairs, **{"training.updates": 40, "training.lr": [5.0], "crops.scale": [1.0, 1.0]})
    trained.run("weights", None)
    image, mask = (part[..., :16, :16] for part in read_pair(pairs, 0))
    scores = trained.scores(trained.reading.transform.normalize(image[None].contiguous()))
    assert scores.shape == (2, 1, 3, 2, 2)
    # The class of each of the four patches is that of most of its pixels.
    truth = mask.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).mode(dim=2).values
    assert (scores[0, 0].argmax(0) == truth).float().mean() >= 0.75


def test_padding_is_of_the_mean_colour(tmp_path: Path) -> None:
    pairs = checked(write_pairs(tmp_path))[0]["train"]
    small = job(pairs, **{"crops.scale": [0.5, 0.5], "crops.distort_color": True})
    batch = next(small.batches())
    images = small.images(batch)
    for image, mask, (height, width) in zip(images, batch.masks, batch.sizes, strict=True):
        assert height < 16 and width < 16
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert (mask[height:] == UNLABELLED).all() and (mask[:height, :width] >= 0).all()
        assert image[:, :height, :width].abs().min() > 0
