"""Sliding windows, confusions and patch k-NN against plain loops and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import Tensor
from torch.nn import functional as F

from mimref.config.load import load_config
from mimref.data.masks.sources import UNLABELLED
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import build_encoder
from mimref.errors import ConfigError
from mimref.features.encode import PassSettings
from mimref.transfer.segment.config import InContextConfig, SegmentConfig, TestMode, Upsampling
from mimref.transfer.segment.heads import HeadInput
from mimref.transfer.segment.in_context import Memory, patch_shares, vote
from mimref.transfer.segment.linear import HeadsJob
from mimref.transfer.segment.metrics import class_ious, class_rows, confusions, score_rows, scores
from mimref.transfer.segment.tokens import PatchTokens
from mimref.transfer.segment.transforms import View, view_of
from mimref.transfer.segment.windows import Viewing, evaluate_images, score_views, window_corners
from tests.pairs import read_pair, write_pairs
from tests.test_data_masks import checked
from tests.tiny import ARCHITECTURE

SIZE, CLASSES = 16, 3
READING = PassSettings(EvalTransform(SIZE, 1.0), torch.device("cpu"), batch_size=3, workers=0)


def patch_scores(images_n3SS: Tensor) -> Tensor:
    """Scores of two heads that depend on every pixel of a patch and on its place in the window."""
    patches = F.avg_pool2d(images_n3SS.double(), 4)
    place = torch.arange(16.0).view(4, 4) / 16
    return torch.stack([patches.sin() + place, (patches * 2).cos() - place])


def view(height: int, width: int, *, mode: TestMode = "full") -> View:
    torch.manual_seed(height)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return view_of(0, image, torch.randint(-1, CLASSES, (height, width), dtype=torch.int16), SIZE, mode)


# --- windows


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("mode", ["crop", "slide", "full"])
def test_one_window_is_one_big_pass(mode: TestMode, upsampling: Upsampling) -> None:
    seen = view(SIZE, SIZE, mode=mode)
    (found,) = (torch.cat(list(each)) for each in score_views([seen], patch_scores, READING, Viewing(mode, upsampling)))
    whole = patch_scores(READING.transform.normalize(seen.image[None]))[:, 0]
    smooth = {"align_corners": False} if upsampling == "bilinear" else {}
    assert torch.equal(found, F.interpolate(whole, size=(SIZE, SIZE), mode=upsampling, **smooth))


def test_corners_are_those_of_mmsegmentation() -> None:
    assert window_corners(16, 16, 16, 10) == [(0, 0)]
    assert window_corners(16, 30, 16, 10) == [(0, 0), (0, 10), (0, 14)]
    for height, width, stride in ((17, 40, 5), (512, 683, 341), (30, 31, 1)):
        size = 512 if height == 512 else 16
        expected = []
        for row in range(max(height - size + stride - 1, 0) // stride + 1):
            for column in range(max(width - size + stride - 1, 0) // stride + 1):
                bottom, right = min(row * stride + size, height), min(column * stride + size, width)
                expected.append((max(bottom - size, 0), max(right - size, 0)))
        assert window_corners(height, width, size, stride) == expected
    assert len(window_corners(512, 683, 512, 341)) == 2


@pytest.mark.parametrize("shape", [(16, 40), (33, 20), (9, 30), (7, 5)])
def test_windows_are_averaged(shape: tuple[int, int]) -> None:
    seen, stride = view(*shape), 7
    found = [
        torch.cat(list(each)) for each in score_views([seen], patch_scores, READING, Viewing("full", "bilinear", 7))
    ]
    height, width = (max(side, SIZE) for side in shape)
    image = torch.zeros(3, height, width)
    image[:, : shape[0], : shape[1]] = READING.transform.normalize(seen.image[None])[0]
    total, count = torch.zeros(2, CLASSES, height, width, dtype=torch.float64), torch.zeros(height, width)
    tops = [*range(0, height - SIZE, stride), height - SIZE]
    lefts = [*range(0, width - SIZE, stride), width - SIZE]
    for top in tops:
        for left in lefts:
            window = patch_scores(image[None, :, top : top + SIZE, left : left + SIZE])[:, 0]
            total[:, :, top : top + SIZE, left : left + SIZE] += F.interpolate(window, SIZE, mode="bilinear")
            count[top : top + SIZE, left : left + SIZE] += 1
    torch.testing.assert_close(found[0], (total / count)[:, :, : shape[0], : shape[1]], rtol=1e-6, atol=1e-9)


def test_resized_images_are_scored_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = view(24, 36, mode="slide")
    assert seen.image.shape == (3, 16, 24) and seen.mask.shape == (24, 36)
    viewing = Viewing("slide", "bilinear")
    (found,) = (torch.cat(list(each)) for each in score_views([seen], patch_scores, READING, viewing))
    inner = view_of(0, seen.image, torch.zeros(16, 24, dtype=torch.int16), SIZE, "full")
    (small,) = (torch.cat(list(each)) for each in score_views([inner], patch_scores, READING, viewing))
    expected = F.interpolate(small, size=(24, 36), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    monkeypatch.setattr("mimref.transfer.segment.windows.PIXEL_ELEMENTS", 1)
    parts = next(list(each) for each in score_views([seen], patch_scores, READING, viewing))
    assert len(parts) == 2 and torch.equal(torch.cat(parts), found)


# --- metrics


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 5, 4000).astype(np.int16)
    predicted = np.where(rng.random((3, 4000)) < 0.6, np.maximum(truth, 0), rng.integers(0, 6, (3, 4000)))
    found = confusions(torch.from_numpy(truth), torch.from_numpy(predicted), 7)
    assert found.dtype == torch.int64
    labelled = truth >= 0
    for head in range(3):
        y, z = truth[labelled], predicted[head][labelled]
        assert np.array_equal(found[head], confusion_matrix(y, z, labels=range(7)))
        own = scores(found[head].numpy())
        # Class 5 is predicted but never true, and counts as 0; class 6 does not occur.
        assert own["miou"] == pytest.approx(100 * jaccard_score(y, z, average="macro", labels=range(6)), abs=1e-10)
        assert own["micro_iou"] == pytest.approx(100 * jaccard_score(y, z, average="micro"), abs=1e-10)
        assert own["accuracy"] == pytest.approx(100 * np.mean(y == z), abs=1e-10)
        ious = class_ious(found[head].numpy())
        assert ious[:6] == pytest.approx(jaccard_score(y, z, average=None, labels=range(6))) and np.isnan(ious[6])
    rows = class_rows(found[0].numpy(), list("abcdefg"), {"k": 1})
    assert [row["class"] for row in rows] == list("abcde") and sum(int(row["pixels"]) for row in rows) == labelled.sum()
    assert [row["metric"] for row in score_rows(found[0].numpy(), {})] == [
        "segment_miou",
        "segment_micro_iou",
        "segment_accuracy",
    ]
    assert np.isnan(scores(np.zeros((3, 3), dtype=np.int64))["miou"])


@pytest.mark.parametrize("mode", ["crop", "slide", "full"])
def test_a_whole_set_equals_a_loop(mode: TestMode, tmp_path: Path) -> None:
    pairs = checked(write_pairs(tmp_path, val=9))[0]["val"]
    viewing = Viewing(mode, "bilinear")
    found = evaluate_images(pairs, patch_scores, 2, READING, viewing)
    truth, predicted = [], [[], []]  # type: ignore[var-annotated]
    for number in range(len(pairs)):
        seen = view_of(number, *read_pair(pairs, number), SIZE, mode)
        (scored,) = (torch.cat(list(each)) for each in score_views([seen], patch_scores, READING, viewing))
        truth.append(seen.mask.flatten())
        for head in range(2):
            predicted[head].append(scored[head].argmax(0).flatten())
        if number < 4:
            sample = found.samples[number]
            assert torch.equal(sample.truth, seen.mask) and torch.equal(sample.predicted_K, scored.argmax(1).short())
    y = torch.cat(truth)
    assert (y != UNLABELLED).all() and len(found.samples) == 4
    for head in range(2):
        assert np.array_equal(found.confusions[head], confusion_matrix(y, torch.cat(predicted[head]), labels=range(3)))


# --- patch k-NN


def test_shares_of_patches() -> None:
    torch.manual_seed(0)
    masks = torch.randint(-1, 3, (2, 8, 8), dtype=torch.int16)
    masks[0, :4, 4:] = UNLABELLED
    shares, labelled = patch_shares(masks, 2, 3)
    for image in range(2):
        for patch in range(4):
            row, column = 4 * (patch // 2), 4 * (patch % 2)
            pixels = masks[image, row : row + 4, column : column + 4].flatten().tolist()
            known = [label for label in pixels if label >= 0]
            assert bool(labelled[image, patch]) == bool(known)
            expected = [known.count(label) / max(1, len(known)) for label in range(3)]
            assert shares[image, patch].tolist() == pytest.approx(expected)


def test_votes() -> None:
    torch.manual_seed(0)
    similarity, index = torch.randn(6, 4), torch.randint(9, (6, 4))
    shares = torch.rand(9, 3)
    found = vote(similarity, index, shares, 0.1)
    for row in range(6):
        weights = np.exp((similarity[row].double().numpy() - similarity[row].double().numpy().max()) / 0.1)
        expected = (weights / weights.sum()) @ shares[index[row]].double().numpy()
        assert found[row].double().numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["crop", "full"])
def test_memory_and_votes_equal_loops(mode: TestMode, tmp_path: Path) -> None:
    found = checked(write_pairs(tmp_path))[0]
    torch.manual_seed(0)
    encoder = build_encoder(ARCHITECTURE).eval()
    tokens = PatchTokens(encoder, [HeadInput((3,))], READING, final_norm=True)
    viewing = Viewing(mode, "bilinear")
    memory = Memory(tokens, found["train"], InContextConfig(k=5), READING, viewing, 0)
    memory.fill()
    x, shares = [], []
    for number in range(12):
        seen = view_of(number, *read_pair(found["train"], number), SIZE, mode)
        images = READING.transform.normalize(seen.image[None])
        for top, left in window_corners(*seen.image.shape[1:], SIZE, 10):
            window = (..., slice(top, top + SIZE), slice(left, left + SIZE))
            x.append(encoder.blocks(images[window], [3])[0][0, 1:].detach())
            for patch in range(4):
                row, column = 8 * (patch // 2), 8 * (patch % 2)
                pixels = seen.mask[window][row : row + 8, column : column + 8].flatten().long()
                shares.append(torch.bincount(pixels, minlength=3) / 64)
    torch.testing.assert_close(torch.from_numpy(memory.x), torch.cat(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.shares, torch.stack(shares))
    image = READING.transform.normalize(view_of(0, *read_pair(found["val"], 0), SIZE, "crop").image[None])
    query = F.normalize(encoder.blocks(image, [3])[0][0, 1:].detach().double(), dim=1)
    similarity = query @ F.normalize(torch.from_numpy(memory.x).double(), dim=1).T
    votes = memory.scores(image)
    assert votes.shape == (1, 1, 3, 2, 2)
    for patch in range(4):
        best = similarity[patch].topk(5)
        expected = (best.values / 0.02).softmax(0) @ memory.shares[best.indices].double()
        torch.testing.assert_close(votes[0, 0, :, patch // 2, patch % 2].double(), expected, rtol=1e-3, atol=1e-4)
    few = Memory(tokens, found["train"], InContextConfig(k=5, memory=24), READING, viewing, 0)
    few.fill()
    assert len(few.x) == 24 and {tuple(row) for row in few.x} <= {tuple(row) for row in memory.x}
    with pytest.raises(ConfigError, match=r"knn\.k 50 is more than the 24 patches"):
        Memory(tokens, found["train"], InContextConfig(k=50, memory=24), READING, viewing, 0).fill()


def test_heads_and_windows_work_together(tmp_path: Path) -> None:
    """With several inputs, the scores of a job are in the order of its heads."""
    pairs = checked(write_pairs(tmp_path))[0]["train"]
    torch.manual_seed(0)
    inputs = [HeadInput((4,)), HeadInput((2, 4), "patch+cls")]
    tokens = PatchTokens(build_encoder(ARCHITECTURE).eval(), inputs, READING, final_norm=False)
    config = load_config(SegmentConfig, overrides={"training.lr": [0.1, 1.0, 5.0], "training.updates": 3})
    job = HeadsJob(config, pairs, tokens, READING, state=None)
    job.run("weights", None)
    images = torch.randn(2, 3, SIZE, SIZE)
    found = job.scores(images)
    assert found.shape == (6, 2, 3, 2, 2)
    for number, x_BND in enumerate(tokens(images)):
        for row in range(3):
            normed = job.heads.norms[number](x_BND.flatten(0, 1))
            plain = normed @ job.heads.weights[number][row].T + job.heads.biases[number][row]
            expected = plain.view(2, 2, 2, 3).permute(0, 3, 1, 2)
            torch.testing.assert_close(found[3 * number + row], expected, rtol=1e-4, atol=1e-5)
