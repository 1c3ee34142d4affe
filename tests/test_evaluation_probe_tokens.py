"""Attentive probes of a tiny encoder: their tokens, cached and streamed, and what cannot be probed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimref.config.base import DataConfig
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError, UserError
from mimref.evaluation.probe.attentive import AttentiveEnsemble
from mimref.evaluation.probe.config import ProbeConfig
from mimref.evaluation.probe.grid import ProbeInput
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.evaluation.probe.tokens import token_inputs
from mimref.features.encode import Column
from mimref.features.inputs import EncoderInputs
from mimref.progress import Silent
from mimref.results import Row
from mimref.training import job
from tests.tiny import write_labelled, write_weights

SMALL: dict[str, Any] = {"kind": "attentive", "lr": [5.0, 50.0], "queries": [2, 4], "epochs": 2, "batch_size": 10}


class Notes(Silent):
    """A listener that records notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """See `Listener`."""
        self.lines.append(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_labelled(folder / "data")
    write_weights(folder / "base.safetensors")
    write_weights(folder / "headless.safetensors", architecture=HEADLESS)
    return folder


HEADLESS = Architecture(
    "custom", 16, width=32, depth=3, num_heads=2, patch_size=8, class_token=False, registers=3, final_norm=False
)


def config(
    folder: Path, checkpoint: str = "base", *, cached: bool = True, final_norm: bool = True, **probe: Any
) -> Any:
    return ProbeConfig.model_validate(
        {
            "checkpoint": str(folder / f"{checkpoint}.safetensors"),
            "data": {"spec": str(folder / "data")},
            "device": "cpu",
            "workers": 0,
            "cached": cached,
            "final_norm": final_norm,
            "probe": SMALL | probe,
        }
    )


def opened(folder: Path, checkpoint: str = "base") -> EncoderInputs:
    given = config(folder, checkpoint)
    return EncoderInputs(given, given.checkpoint, Silent())


def probed(folder: Path, listener: Notes | None = None, state: Path | None = None, **changes: Any) -> list[Row]:
    return evaluate_probe(config(folder, **changes), listener=listener, state=state).rows


def values(rows: Sequence[Row]) -> list[float]:
    return [float(row["value"]) for row in rows]


def test_tokens_of_the_blocks(folder: Path) -> None:
    inputs = opened(folder)
    found = token_inputs(inputs, config(folder, tokens="both", blocks="both").probe, final_norm=True)
    four = [Column(block, "patches", block == 4) for block in (1, 2, 3, 4)]
    both = [Column(block, pool, block == 4) for block in (1, 2, 3, 4) for pool in ("cls", "patches")]
    assert found.groups == {
        ProbeInput("last", "patch"): four[3:],
        ProbeInput("last", "cls+patch"): both[6:],
        ProbeInput("last4", "patch"): four,
        ProbeInput("last4", "cls+patch"): both,
    }
    assert [(shape.tokens, shape.widths) for shape in found.shapes] == [
        *((4, (32,)), (5, (32,))),
        *((4, (32,) * 4), (5, (32,) * 4)),
    ]
    # Values read per image: five tokens of width 32 from four blocks.
    assert found.numbers == 4 * 5 * 32
    raw = token_inputs(inputs, config(folder).probe, final_norm=False)
    assert raw.groups == {ProbeInput("last", "patch"): [Column(4, "patches")]} and raw.numbers == 4 * 32
    # Without a CLS token, only patches are read; registers are left out.
    headless = token_inputs(opened(folder, "headless"), config(folder, tokens="both").probe, final_norm=True)
    assert list(headless.groups) == [ProbeInput("last", "patch")] and headless.shapes[0].tokens == 4


def test_the_probes_read_the_encoders_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are the CLS token, if asked for, and the patches of the last block, without registers."""
    seen: list[torch.Tensor] = []
    logits = AttentiveEnsemble.logits

    def watch(ensemble: AttentiveEnsemble, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        seen.append(torch.cat([s.unflatten(x) for s, x in zip(ensemble.shapes, rows, strict=True)], dim=1))
        return logits(ensemble, rows)

    monkeypatch.setattr(AttentiveEnsemble, "logits", watch)
    for name, tokens, prefix in (("base", "cls+patch", 1), ("headless", "patch", 3)):
        seen.clear()
        probed(folder, checkpoint=name, tokens=tokens, epochs=1)
        inputs = opened(folder, name)
        source = inputs.source("val")
        images = torch.stack([inputs.settings.transform.crop(source.read(index)) for index in range(len(source))])
        with torch.no_grad():
            (expected,) = inputs.encoder.blocks(
                inputs.settings.transform.normalize(images), [inputs.depth], final_norm=True
            )
        expected = expected if name == "base" else expected[:, prefix:]
        torch.testing.assert_close(torch.cat(seen), expected, rtol=1e-5, atol=1e-6)


def test_streamed_tokens_equal_cached_ones(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Images, batches and scores are the same, and weights agree to rounding."""
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path))
    trained: list[AttentiveEnsemble] = []
    built = AttentiveEnsemble.__init__

    def watch(ensemble: AttentiveEnsemble, *arguments: Any, **options: Any) -> None:
        built(ensemble, *arguments, **options)
        trained.append(ensemble)

    monkeypatch.setattr(AttentiveEnsemble, "__init__", watch)
    for select in ("test", "val-split"):
        told = [Notes(), Notes(), Notes()]
        # 48 and 16 images with 128 values of 4 bytes each: 25 kB and 8 kB.
        rows = [
            probed(folder, listener, select=select, tokens_gb=limit)
            for listener, limit in zip(told, (1.0, 2e-5, 1e-6), strict=True)
        ]
        assert [each[0]["protocol"] for each in rows] == ["cached", "streamed", "streamed"]
        assert values(rows[0]) == values(rows[1]) == values(rows[2])
        for other in trained[-2:]:
            for ours, theirs in zip(trained[-3].state_dict().values(), other.state_dict().values(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert "3.3e-05 GB" in told[0].lines[0] and "within" in told[0].lines[0]
        assert "in every epoch" in told[1].lines[0] and len(told[1].lines) == 1
        assert "in every epoch" in told[2].lines[0] and "for scoring" in told[2].lines[1]


def test_the_limit_bounds_what_is_cached(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path))
    sizes = {}
    for limit in (1e-6, 2e-5, 1.0):
        probed(folder, tokens_gb=limit)
        sizes[limit] = sum(path.stat().st_size for path in tmp_path.rglob("*-patches-normed"))
        assert sizes[limit] <= limit * 1e9
    assert list(sizes.values()) == [0, 16 * 128 * 4, 64 * 128 * 4]


def test_damaged_tokens_are_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path))
    expected = probed(folder)
    (file, *_) = sorted(tmp_path.rglob("block-04-patches-normed"))
    whole = file.read_bytes()
    assert np.isfinite(np.frombuffer(whole, np.float32)).all()
    for content in (whole[:-4], whole[:8] + bytes([whole[8] ^ 255]) + whole[9:]):
        file.write_bytes(content)
        told = Notes()
        assert probed(folder, told) == expected
        assert any("damaged (block-04-patches-normed)" in line for line in told.lines)
        assert file.read_bytes() == whole


def test_half_precision_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path))
    given = config(folder)
    half = given.model_copy(update={"cache": given.cache.model_copy(update={"dtype": "fp16"})})
    told = Notes()
    rows = evaluate_probe(half, listener=told).rows
    assert "(fp16)" in told.lines[0] and len(rows) == 5
    (file, *_) = sorted(tmp_path.rglob("block-04-patches-normed"))
    assert file.stat().st_size in (48 * 128 * 2, 16 * 128 * 2)


@pytest.mark.parametrize("limit", [1.0, 2e-5, 1e-6])
@pytest.mark.parametrize("cached", [True, False])
def test_resumed_equals_uninterrupted(
    cached: bool, limit: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(job, "SAVE_COST", 0.0)
    expected = probed(folder, cached=cached, tokens_gb=limit, state=tmp_path / "whole")

    class Stopping(Notes):
        def progress(self, label: str, done: int, total: int) -> None:
            if (label, done) == ("attentive probes", 5):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_probe(config(folder, cached=cached, tokens_gb=limit), listener=Stopping(), state=tmp_path / "parts")
    assert probed(folder, cached=cached, tokens_gb=limit, state=tmp_path / "parts") == expected
    whole, parts = (torch.load(tmp_path / name)["ensemble"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(ConfigError, match="another queries"):
        probed(folder, cached=cached, tokens_gb=limit, state=tmp_path / "parts", queries=[2])
    raw = config(folder, cached=cached, tokens_gb=limit).model_copy(update={"final_norm": False})
    with pytest.raises(ConfigError, match="another set of images or encoder"):
        evaluate_probe(raw, state=tmp_path / "parts")


def test_rows(folder: Path) -> None:
    rows = probed(folder, tokens="both", select="val-split")
    best, every = rows[0], rows[1:]
    assert [(row["pool"], row["queries"], row["lr"], row["classifier"]) for row in every] == [
        (pool, queries, lr, 4 * p + 2 * q + r + 1)
        for p, pool in enumerate(("patch", "cls+patch"))
        for q, queries in enumerate((2, 4))
        for r, lr in enumerate((5.0, 50.0))
    ]
    shared = {"metric": "attentive_top1", "blocks": "last", "epochs": 2, "batch_size": 10, "norm": "batch"}
    assert all(row.items() >= (shared | {"protocol": "cached"}).items() for row in rows)
    held = [float(row["held_out_top1"]) for row in every]
    winner = every[held.index(max(held))]
    assert best["select"] == "val-split" and all(best[key] == winner[key] for key in ("value", "pool", "queries", "lr"))
    assert probed(folder, tokens="both", select="val-split") == rows


def test_augmented_batches_are_those_of_the_linear_probe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: dict[str, list[torch.Tensor]] = {"linear": [], "attentive": []}
    for kind, seen in images.items():
        blocks = Encoder.blocks

        def watch(
            encoder: Encoder, batch: torch.Tensor, *rest: Any, seen: Any = seen, blocks: Any = blocks, **o: Any
        ) -> Any:
            if len(batch) == 10:
                seen.append(batch)
            return blocks(encoder, batch, *rest, **o)

        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "blocks", watch)
            linear = {"kind": "linear", "queries": [32], "lr": [0.1]} if kind == "linear" else {}
            rows = probed(folder, cached=False, **linear)
        assert rows[0]["protocol"] == "augmented"
    assert len(images["linear"]) == len(images["attentive"]) == 8
    for ours, theirs in zip(images["attentive"], images["linear"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": [4, 5]}, ("probe.queries 5", "width 32", "choose 4 or 8")),
        ({"queries": [64]}, ("probe.queries 64", "choose 32")),
        ({"checkpoint": "headless", "tokens": "cls+patch"}, ("probe.tokens 'cls+patch'", "no CLS token")),
        ({"checkpoint": "headless", "blocks": "last4"}, ("probe.blocks 'last4'", "3 blocks")),
    ],
)
def test_bad_settings(change: dict[str, Any], words: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        probed(folder, **change)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_encoders_without_patch_tokens(folder: Path) -> None:
    given = config(folder).model_copy(update={"resolution": 8})
    with pytest.raises(ConfigError, match=r"block 4 of custom has 1 patch token on images of 8 pixels"):
        evaluate_probe(given)


def test_features_from_files_hold_no_tokens(tmp_path: Path) -> None:
    y = np.arange(8) % 2
    for name in ("train", "val"):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((8, 4), np.float32), y=y)
    files = (str(tmp_path / "train.npz"), str(tmp_path / "val.npz"))
    given = ProbeConfig.model_validate({"features": files, "cached": True, "probe": {"kind": "attentive"}})
    with pytest.raises(ConfigError, match="--features holds pooled features"):
        evaluate_probe(given)


def test_other_backbones(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Feature maps become tokens; stages of different sizes cannot be joined."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", pretrained=False, num_classes=0)
    save_file(model.state_dict(), tmp_path / "convnext.safetensors")
    given = config(folder).model_copy(
        update={
            "checkpoint": str(tmp_path / "convnext.safetensors"),
            "arch": "convnextv2_atto",
            "resolution": 64,
            "data": DataConfig(spec=str(folder / "data"), train_limit=20),
        }
    )
    rows = evaluate_probe(given).rows
    assert {row["pool"] for row in rows} == {"patch"} and len(rows) == 5
    four = given.model_copy(update={"probe": given.probe.model_copy(update={"blocks": "last4"})})
    with pytest.raises(ConfigError, match=r"different numbers of patch tokens \(4, 16, 64, 256\)"):
        evaluate_probe(four)
