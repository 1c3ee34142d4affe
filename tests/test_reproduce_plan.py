"""The runs of a suite: what runs once, what shares stage 1, and which earlier runs are kept."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mimref.config.base import DataConfig, dump_config
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.files import write_bytes
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.reproduce import worker
from mimref.reproduce.config import AblationsConfig
from mimref.reproduce.plan import Suite, check_earlier, make_suite, same_heads
from tests.tiny import EVALUATED, REFINE, refine_config, results, tensors, write_labelled, write_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    write_weights(folder / "base.safetensors")
    write_labelled(folder / "data")
    return folder


def suite(folder: Path, **changes: Any) -> Suite:
    """Make a suite; `changes` are named like `heads__blocks`."""
    dotted = {key.replace("__", "."): value for key, value in (EVALUATED | changes).items()}
    files = {"encoder.weights": str(folder / "base.safetensors"), "data.spec": str(folder / "data")}
    return make_suite(load_config(AblationsConfig, None, REFINE | files | dotted), folder / "out")


def test_equal_settings_run_once_with_every_seed(folder: Path) -> None:
    # With heads on blocks 3-4 of 4, the paper's 1, 2 and 4 heads are one run, and the lines of (b) need no others.
    made = suite(folder, seeds=[3, 5])
    names = [run.name for run in made.refinements]
    assert len(set(names)) == len(names) and names[:2] == ["default-seed3", "default-seed5"]
    assert {name.rpartition("-seed")[0] for name in names} == {
        *("default", "a-1-heads", "a-3-heads", "c-uniform_decay", "c-staggered_decay", "c-staggered_step", "c-one_hot"),
        *("d-frozen-1", "d-frozen-2", "e-swapped", "f-no-local-views", "f-plain"),
    }
    # Heads on 3, 4 are the default; on 2, 3, 4 they are those of (a).
    assert made.names[5:10] == ["default", *["a-3-heads"] * 3, "default"]
    assert len({(dump_config(run.config), run.config.seed) for run in made.refinements}) == len(names)
    assert [run.name for run in made.curves] == ["blocks-base", "blocks-default-seed3", "blocks-default-seed5"]


def test_the_bases_curve_is_of_the_same_image_size(folder: Path) -> None:
    for changes, size in ({}, 16), ({"encoder__image_size": 32}, 32):
        base = suite(folder, seeds=[0], tables=["e"], **changes).curves[0].config
        assert isinstance(base, BlocksConfig) and base.resolution == size


def test_curves_list_the_images_left_out(folder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    (bad := data / "val" / "a" / "000.png").write_bytes(b"no image")
    base = (
        suite(folder, seeds=[0], tables=["e"]).curves[0].config.model_copy(update={"data": DataConfig(spec=str(data))})
    )
    (tmp_path / "settings.toml").write_text(dump_config(base))
    worker.work("analyze-blocks", tmp_path / "settings.toml", tmp_path / "out")
    assert [each["path"] for each in results(tmp_path / "out")["bad_images"]] == [str(bad)]


def test_names_do_not_depend_on_the_tables(folder: Path) -> None:
    assert [run.name for run in suite(folder, tables=["b"], seeds=[0]).refinements] == [
        "default-seed0",
        "a-3-heads-seed0",
    ]


def test_stage_1_is_shared_where_it_is_the_same(folder: Path) -> None:
    made = suite(folder, seeds=[1])
    shared = {run.name[0] for run in made.refinements if run.needs}
    assert shared == {"c", "d"}
    for run in made.refinements:
        assert isinstance(run.config, RefineConfig)
        assert run.config.seed == 1 and run.config.data == made.plan.config.data
        if run.needs:
            assert run.needs == ("default-seed1", folder / "out" / "runs" / "default-seed1" / "heads.pt")
            assert (run.config.stage, run.config.heads_from) == ("encoder", str(run.needs[1].parent))


def test_sharing_stage_1_changes_nothing(folder: Path, tmp_path: Path) -> None:
    weights, data = folder / "base.safetensors", folder / "data"
    default = refine_config(weights, data, heads_stage__epochs=1, encoder_stage__epochs=1)
    changed = {"loss__schedule": "one_hot", "encoder_stage__freeze_blocks": 2}
    whole = refine_config(weights, data, heads_stage__epochs=1, encoder_stage__epochs=1, **changed)
    assert same_heads(whole, default)
    assert not same_heads(refine_config(weights, data, loss__swap_negatives=True), default)
    refine(default, tmp_path / "default")
    refine(whole, tmp_path / "whole")
    update = {"stage": "encoder", "heads_from": str(tmp_path / "default")}
    refine(whole.model_copy(update=update), tmp_path / "shared")
    found, expected = tensors(tmp_path / "shared"), tensors(tmp_path / "whole")
    assert [name for name in expected if not (found[name] == expected[name]).all()] == []


def test_earlier_runs_are_kept_with_equal_settings_alone(folder: Path) -> None:
    made = suite(folder, seeds=[0], tables=["e"])
    for run in made.refinements:
        write_bytes(run.settings, dump_config(run.config).encode())
    for changes in ({}, {"seeds": [0, 1], "tables": ["a", "e"]}, {"monitor__knn_samples": 30}):
        check_earlier(suite(folder, **changes))
    with pytest.raises(ConfigError, match=r"run default-seed0 .*heads.temperature: it was 0.3 and is now 0.4"):
        check_earlier(suite(folder, seeds=[0], tables=["e"], heads__temperature=0.4))
    # Runs that are evaluated in different ways cannot be in one table.
    with pytest.raises(ConfigError, match=r"run default-seed0 .*evaluate.cluster_runs: it was \d+ and is now 3"):
        check_earlier(suite(folder, evaluate__cluster_runs=3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed 1"),
        ({"seeds": [0, 0]}, "seeds 0,0"),
        ({"tables": ["a", "a"]}, "tables a,a"),
        ({"stage": "heads"}, "stage = 'heads'"),
        ({"heads": {"temperature": [0.1, 0.2]}}, "heads.temperature"),
        ({"evaluate": {"enabled": False}}, "evaluate.enabled"),
        ({"jobs": 0}, "greater than 0"),
        ({"tables": ["g"]}, "'f'"),
    ],
)
def test_settings_that_have_no_ablations(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        AblationsConfig.model_validate(changes)
