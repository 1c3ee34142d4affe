"""Table 1 for encoders of other depths: the paper's own settings come out for its own encoder."""

from typing import Any

import pytest

from mimref.config.load import load_config
from mimref.config.presets import preset_names
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks
from mimref.reproduce.table1 import Line, nearest, table_lines
from tests.test_presets import flatten


def lines(depth: int, blocks: range | list[int], **changes: Any) -> list[Line]:
    config = load_config(RefineConfig, "d2v2_l16", changes)
    return table_lines(config, depth, list(blocks))


def test_the_papers_encoder_gives_the_presets_of_its_ablations() -> None:
    default = flatten(load_config(RefineConfig, "d2v2_l16"))
    expected = []
    for name in preset_names("refine"):
        if name.startswith("refine/ablation/") and "_h14_" not in name:
            found = flatten(load_config(RefineConfig, name))
            changed = {key: found[key] for key in found if found[key] != default[key] and key != "preset"}
            if "heads.blocks" in changed:
                changed["heads.blocks"] = head_blocks(changed["heads.blocks"], 24)
            expected.append(changed | {"": name})
    made = []
    for line in lines(24, range(17, 25)):
        if line.changes:
            changed = dict(line.changes)
            if "heads.blocks" in changed:
                changed["heads.blocks"] = head_blocks(changed["heads.blocks"], 24)
            made.append(changed)
    for preset in expected:
        name = preset.pop("")
        assert preset in made, name
    assert len(made) == len(expected)


def test_published_numbers() -> None:
    published = {(line.table, line.paper): dict(line.published) for line in lines(24, range(17, 25))}
    assert len(published) == 5 + 5 + 5 + 3 + 2 + 3
    assert published["a", "1"] == {"knn_top1": 80.2} and published["b", "15, 18, 21, 24"] == {"knn_top1": 81.1}
    assert published["c", "one hot"] == {"knn_top1": 80.7} and published["d", "12"] == {"knn_top1": 80.6}
    assert published["e", "swapped"] == {"knn_top1": 80.9}
    assert published["f", "no colour or blur, multi-crop"] == {"knn_top1": 80.5, "lowshot_top1": 63.4}


@pytest.mark.parametrize(
    ("depth", "blocks", "counts", "spacing", "frozen"),
    [
        (16, range(9, 17), [1, 2, 4, 8, 12], ["12, 16", "8, 12, 16", "7, 10, 13, 16", "10, 12, 14, 16"], [0, 4, 8]),
        (12, range(9, 13), [1, 1, 2, 4, 6], ["10, 12", "8, 10, 12", "7, 9, 10, 12", "9, 10, 11, 12"], [0, 3, 6]),
        (32, range(21, 33), [2, 3, 6, 12, 18], ["26, 32", "20, 26, 32", "18, 23, 27, 32", "23, 26, 29, 32"], [0, 8, 16]),  # noqa: E501
        (4, [3, 4], [1, 1, 1, 2, 3], ["3, 4", "2, 3, 4", "2, 3, 4", "2, 3, 4"], [0, 1, 2]),
    ],
)  # fmt: skip
def test_other_depths(depth: int, blocks: range | list[int], counts: Any, spacing: Any, frozen: Any) -> None:
    found = lines(depth, blocks)
    assert [int(line.setting) for line in found if line.table == "a"] == counts
    assert [line.setting for line in found if line.table == "b"][:-1] == spacing
    assert [int(line.setting) for line in found if line.table == "d"] == frozen
    for line in found:
        if "heads.blocks" in line.changes:
            assert head_blocks(line.changes["heads.blocks"], depth)[-1] == depth


def test_halves_are_rounded_up() -> None:
    assert [nearest(share) for share in (0.49, 0.5, 1.5, 2.5, 2.49)] == [0, 1, 2, 3, 2]


def test_augmentations_that_the_default_lacks() -> None:
    found = {line.name: line for line in lines(24, range(17, 25), **{"views.color": False, "views.blur": False})}
    assert found["f-plain"].missing and not found["f-plain"].changes and not found["f-no-local-views"].missing
    found = {line.name: line for line in lines(24, range(17, 25), **{"views.local_views": 0})}
    assert found["f-no-local-views"].missing and not found["f-plain"].missing


@pytest.mark.parametrize("blocks", [[24], [20, 20, 24], [24, 20]])
def test_heads_without_ablations(blocks: list[int]) -> None:
    with pytest.raises(ConfigError, match="two blocks"):
        lines(24, blocks)


def test_a_warm_up_stays_as_long() -> None:
    for epochs, warmup, expected in ((7, 3.5, (3, 3.0)), (8, None, (4, 1.6)), (40, None, (20, 4.0))):
        changes = {"encoder_stage.epochs": epochs, "encoder_stage.warmup_epochs": warmup}
        (plain,) = (line for line in lines(24, range(17, 25), **changes) if line.name == "f-plain")
        found = [plain.changes[f"encoder_stage.{name}"] for name in ("epochs", "warmup_epochs")]
        assert found == pytest.approx(expected)
