"""Weights divided among processes: the same steps as with DDP and with one process, and what each rank then holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimref.distributed.collectives import averaged
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.sharding import (
    Sharded,
    all_finite,
    check_sharding,
    clip_gradients,
    gathered,
    is_sharded,
    lean,
    like,
    local,
)
from mimref.encoders.parameters import encoder_groups, freeze_untrained, weights_hash
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.refinement.method import Method, monitored_values
from mimref.training.ema import ShardedAverage, WeightAverage
from mimref.training.optim import adamw, module_groups, set_learning_rate
from tests.families import FAMILIES, backbone
from tests.ranks import run_ranks
from tests.steps import ARCHITECTURE, CPU, make_batch, make_step, weights
from tests.test_distributed_collectives import compare, part_of

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on CUDA alone")
SAMPLES = 8
# 42 hidden units, 3 heads and single tokens are not divisible by the ranks: parts differ, and some are empty.
UNEVEN = Architecture(**{**ARCHITECTURE.to_dict(), "mlp_width": 42})


def distribute(step: Method, how: str, train_encoder: bool) -> WeightAverage | ShardedAverage:
    """Shard both modules, or average the gradients of what is trained; return the encoder's average."""
    if how == "shard":
        if step.dense is not None:
            Sharded(step.dense.base, step.dense.base.block_modules, CPU, method="blocks")
        step.shard()
        assert step.sharded_encoder is not None
        return ShardedAverage(step.sharded_encoder, 0.9)
    step.trained_heads = averaged(step.heads, CPU)
    if train_encoder:
        step.trained_encoder = averaged(step.pooled_blocks, CPU)
    return WeightAverage(step.encoder, 0.9)


def train(
    how: str,
    *,
    steps: int = 3,
    micro_batch: int | None = None,
    lost: int = 0,
    frozen: int = 0,
    checkpointing: bool = False,
    train_encoder: bool = True,
    clip: float | None = None,
    **variant: Any,
) -> dict[str, Any]:
    """Train both modules, or the heads alone; return all that is compared afterwards.

    how: `shard` or `ddp`, which are the same in a single process.
    """
    torch.manual_seed(1)
    step = make_step(encoder=build_encoder(UNEVEN), **variant)
    blocks = variant.get("blocks", [4, 2, 3])
    freeze_untrained(step.encoder, first=frozen, last=max(blocks))
    step.encoder.checkpointing = checkpointing
    assert step.encoder.vit.cls_token is not None
    step.encoder.vit.cls_token.data.copy_(torch.linspace(-1, 1, 32))
    step.micro_batch, step.most_images = micro_batch, -(-SAMPLES // world_size())
    average = distribute(step, how, train_encoder)
    groups = encoder_groups(step.encoder, weight_decay=0.05, layer_decay=0.9) if train_encoder else []
    optimizer = adamw(groups + module_groups(step.heads, weight_decay=1e-5), (0.9, 0.95))
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    modules, logs, gradients, noise = (step.encoder, step.heads), [], [], dict[str, Tensor]()
    for number in range(steps):
        alone = world_size() == 1
        batch = make_batch(range(number, number + SAMPLES - lost * alone))
        set_learning_rate(optimizer, 1e-4)
        values = step.forward_backward(
            batch if alone else part_of(batch, lost), weights(len(blocks)), top_k=3, train_encoder=train_encoder
        )
        logs.append(monitored_values(values, torch.arange(40) % 3))
        if clip is not None:
            (clip_gradients if how == "shard" else nn.utils.clip_grad_norm_)(trained, clip)
        found = {n: gathered(p.grad) for m in modules for n, p in m.named_parameters() if p.grad is not None}
        gradients.append(torch.cat([gradient.flatten() for gradient in found.values()]))
        for name, gradient in found.items():
            tiny = gradient.abs() < 1e-7 * gradients[-1].norm()
            noise[name] = noise.get(name, tiny) | tiny
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
    assert all_finite(trained)
    encoder = {name: gathered(tensor) for name, tensor in step.encoder.state_dict().items()}
    means = {name: gathered(tensor) for name, tensor in average.state_dict().items()}
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in step.plain_encoder().state_dict().items())
    return {
        "logs": logs,
        "gradients": gradients,
        "queue": step.queue.state_dict(),
        "encoder": encoder | {f"average.{name}": tensor for name, tensor in means.items()},
        "heads": {name: tensor.clone() for name, tensor in step.plain_heads().state_dict().items()},
        "noise": noise | {f"average.{name}": tiny for name, tiny in noise.items()},
        "hash": weights_hash(step.encoder),
    }


FAST: dict[str, dict[str, Any]] = {
    "stage 2": {"steps": 3},
    "micro-batches, recomputed, frozen, gram, clipped": {
        "micro_batch": 3,
        "checkpointing": True,
        "frozen": 1,
        "dense": "gram",
        "clip": 0.1,
        "lost": 2,
    },
    "stage 1": {"train_encoder": False, "micro_batch": 3, "lost": 1},
}
SLOW: dict[str, dict[str, Any]] = {
    "stage 2, 20 updates": {"steps": 20},
    "stage 1, 20 updates": {"train_encoder": False, "steps": 20},
    "stage 1, running norm": {"train_encoder": False, "norm": "running", "steps": 8},
    "micro-batches, 20 updates": {"micro_batch": 3, "steps": 20},
    "micro-batches of one, images lost": {"micro_batch": 1, "lost": 2, "steps": 20},
    "recomputed, 20 updates": {"checkpointing": True, "steps": 20},
    "recomputed micro-batches": {"checkpointing": True, "micro_batch": 2, "steps": 20},
    "two frozen blocks": {"frozen": 2, "blocks": [4, 3], "steps": 20},
    "frozen and recomputed": {"frozen": 2, "blocks": [4, 3], "checkpointing": True, "micro_batch": 3, "steps": 20},
    "blocks before the last": {"blocks": [3, 2], "steps": 20},
    "gram": {"dense": "gram", "steps": 20},
    "gram, micro-batches": {"dense": "gram", "micro_batch": 3, "steps": 20, "lost": 1},
    "cka": {"dense": "cka", "steps": 20},
    "clipped": {"clip": 0.1, "steps": 20},
    "prediction": {"direction": "prediction", "steps": 20},
    "post-norm": {"norm": "layer", "swap_negatives": True, "steps": 20},
}


def train_all(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {how: train(how, **case) for how in ("shard", "ddp")} for name, case in cases.items()}


def check_all(cases: dict[str, dict[str, Any]], ranks: list[dict[str, dict[str, Any]]]) -> None:
    for name, case in cases.items():
        alone = train("ddp", **case)
        for found in ranks:
            compare(alone, found[name]["shard"], 1e-9)
            compare(found[name]["ddp"], found[name]["shard"], 1e-9)
            assert found[name]["shard"]["hash"] == ranks[0][name]["shard"]["hash"]


def fast() -> dict[str, Any]:
    """Run all that two ranks do in the default suite: starting them takes seconds."""
    return {"trained": train_all(FAST), "held": held(), "passes": passes(), "clipped": clipped(), "loaded": loaded()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(fast, 2, tmp_path_factory.mktemp("ranks"))


def test_sharded_equals_ddp_and_one_process(two: list[dict[str, Any]]) -> None:
    check_all(FAST, [found["trained"] for found in two])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FAST | SLOW)
def test_every_variant_equals_ddp_and_one_process(name: str, world: int, tmp_path: Path) -> None:
    cases = {name: (FAST | SLOW)[name]}
    check_all(cases, run_ranks(train_all, world, tmp_path, cases))


def tiny_sharded(dtype: torch.dtype = torch.float32) -> tuple[Any, Sharded]:
    torch.manual_seed(0)
    encoder = build_encoder(UNEVEN).to(dtype)
    return encoder, Sharded(encoder, encoder.block_modules, CPU, method="blocks")


def held() -> dict[str, Any]:
    """Count the elements of every weight, its gradient and its moments on this rank."""
    encoder, _ = tiny_sharded()
    whole = {name: weight.numel() for name, weight in encoder.named_parameters()}
    optimizer = adamw(encoder_groups(encoder, weight_decay=0.0, layer_decay=1.0), (0.9, 0.95))
    encoder.blocks(torch.randn(2, 3, 8, 8), [4], final_norm=True)[0].square().mean().backward()
    optimizer.step()
    kept = {}
    for name, weight in encoder.named_parameters():
        if weight.grad is None:  # fixed positions
            whole.pop(name)
            continue
        moments = [value for value in optimizer.state[weight].values() if value.ndim]
        kept[name] = [local(each).numel() for each in (weight, weight.grad, *moments)]
    return {"whole": whole, "kept": kept}


def test_every_rank_holds_its_part_of_weights_gradients_and_moments(two: list[dict[str, Any]]) -> None:
    for name, whole in two[0]["held"]["whole"].items():
        parts = [found["held"]["kept"][name] for found in two]
        assert all(part == [part[0]] * 4 for part in parts), name
        assert sum(part[0] for part in parts) == whole
    most = max(sum(part[0] for part in found["held"]["kept"].values()) for found in two)
    assert most < 0.52 * sum(two[0]["held"]["whole"].values())


def passes() -> dict[str, Any]:
    """Return what passes without gradient leave behind, and the properties of plain copies."""
    encoder, sharded = tiny_sharded()
    images, left = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for _ in range(3):
        with torch.no_grad():
            tokens = encoder.blocks(images, [2, 4])[1]
        groups = [each._get_fsdp_state()._fsdp_param_group for each in encoder.modules() if hasattr(each, "unshard")]
        left.append(sum(len(g.comm_ctx.post_forward_order) + len(g._post_forward_indices) for g in groups))
    plain: Any = sharded.plain(sharded.weights, CPU)
    first: Any = sharded.plain_on_first(sharded.weights)
    bf16: Any = sharded.plain(sharded.weights, CPU, precision=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        same = torch.equal(bf16.blocks(images, [4])[0], plain.blocks(images, [4])[0])
    return {
        "left": left,
        "sharded": all(map(is_sharded, encoder.parameters())),
        "plain": torch.equal(plain.blocks(images, [4])[0], tokens) and not any(map(is_sharded, plain.parameters())),
        "trains": plain.training or any(weight.requires_grad for weight in plain.parameters()),
        "on first": {weight.is_meta for weight in first.parameters()},
        "types": {str(weight.dtype) for weight in bf16.parameters()},
        "same": same,
    }


def test_passes_without_gradient_leave_nothing_and_copies_are_plain(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        seen = found["passes"]
        assert seen["left"] == [0, 0, 0] and seen["sharded"] and seen["plain"] and not seen["trains"]
        # Every rank takes part, but only one keeps the result.
        assert seen["on first"] == {rank > 0}
        assert seen["types"] == {"torch.float32", "torch.bfloat16"} and seen["same"]


def clipped() -> list[Tensor]:
    """Return gradients after clipping, which ignores a weight without one; check that all ranks see the NaN of one."""
    encoder, _ = tiny_sharded()
    trained = list(encoder.parameters())
    for place, weight in enumerate(trained[1:]):
        weight.grad = torch.full_like(weight, place + 1.0)
    clip_gradients(trained, 0.5)
    found = [gathered(weight.grad) for weight in trained[1:]]
    assert all_finite(trained)
    if own_rank() == world_size() - 1:
        local(next(weight for weight in trained if local(weight).numel())).flatten()[0] = float("nan")
    assert not all_finite(trained)
    return found


def test_clipping_and_the_search_for_numbers_that_are_not(two: list[dict[str, Any]]) -> None:
    weights = list(build_encoder(UNEVEN).parameters())[1:]
    for place, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, place + 1.0)
    nn.utils.clip_grad_norm_(weights, 0.5)
    for found in two:
        for gradient, weight in zip(found["clipped"], weights, strict=True):
            torch.testing.assert_close(gradient, weight.grad)


def loaded() -> bool:
    """Load a plain state into sharded weights, and sharded tensors into others; return whether all are equal."""
    torch.manual_seed(5)
    other = build_encoder(UNEVEN)
    encoder, _ = tiny_sharded()
    encoder.load_state_dict(like(other.state_dict(), encoder.state_dict()))
    twice, _ = tiny_sharded()
    twice.load_state_dict(like(encoder.state_dict(), twice.state_dict()))
    found = [{name: gathered(tensor) for name, tensor in each.state_dict().items()} for each in (encoder, twice)]
    wrong = like({"a": torch.zeros(3, 3)}, {"a": next(encoder.parameters())})["a"]
    assert not is_sharded(wrong) and wrong.shape == (3, 3)
    return all(torch.equal(each[name], tensor) for each in found for name, tensor in other.state_dict().items())


def test_plain_states_load_into_sharded_weights(two: list[dict[str, Any]]) -> None:
    assert all(found["loaded"] for found in two)


def test_sharding_is_refused_where_torch_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding(CPU)
    check_sharding(torch.device("cuda"))
    for device in ("cpu", "mps"):
        monkeypatch.setattr(torch.cpu, "Stream", object)
        with pytest.raises(ConfigError, match=f"--shard does not work on {device} with torch"):
            check_sharding(torch.device(device))


def test_lean_copies_keep_norms_and_other_precisions() -> None:
    encoder = lean(build_encoder(UNEVEN), torch.bfloat16)
    assert encoder.vit.blocks[0].norm1.weight.dtype == torch.float32
    assert encoder.vit.blocks[0].mlp.fc1.weight.dtype == encoder.vit.patch_embed.proj.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in lean(build_encoder(UNEVEN).double(), torch.float32).parameters()} == {
        torch.float64
    }


def families(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return how gradients of sharded backbones, with or without recomputed blocks, differ from plain ones'."""
    found = {}
    for name in names:
        kinds = ("plain", "sharded", "recomputed")
        made = {kind: backbone(FAMILIES[name]).double() for kind in kinds}
        for kind, encoder in made.items():
            freeze_untrained(encoder, first=0, last=encoder.depth)
            encoder.checkpointing = kind == "recomputed"
            if kind != "plain":
                Sharded(encoder, encoder.block_modules, CPU, method="blocks")
            size = FAMILIES[name].image_size
            images = torch.randn(2, FAMILIES[name].channels, size, size, dtype=torch.float64, generator=seeded())
            wanted = [encoder.depth - 1, encoder.depth]
            tokens = encoder.blocks(images, wanted, final_norm=FAMILIES[name].has_final_norm)
            sum(each.square().mean() for each in tokens).backward()  # type: ignore[union-attr]
            gradients = {n: gathered(w.grad) for n, w in encoder.model.named_parameters() if w.grad is not None}
            plain = made["plain"].model.get_parameter
            if kind != "plain":
                found[f"{name} {kind}"] = {n: gradient - plain(n).grad for n, gradient in gradients.items()}
                assert gradients.keys() == {n for n, w in made["plain"].model.named_parameters() if w.grad is not None}
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gray"])
def test_backbones_of_every_family(name: str, tmp_path: Path) -> None:
    backbone(FAMILIES[name])  # skips if this timm lacks it
    for found in run_ranks(families, 2, tmp_path, [name]):
        assert len(found) == 2
        for kind, differences in found.items():
            assert len(differences) > 10
            assert all(difference.abs().max() < 1e-9 for difference in differences.values()), kind
