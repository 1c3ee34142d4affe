"""One refinement step against a plain one, in float64, on an encoder of four blocks."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimref.refinement.method as step_module
from mimref.config.run import ViewsConfig
from mimref.data.loader import ViewBatch
from mimref.data.views import Photometric
from mimref.draws import Operation, uniform
from mimref.encoders.vit import Encoder, build_encoder
from mimref.refinement.alignment import Alignment, Neighbours, Queue
from mimref.refinement.config import LossConfig
from mimref.refinement.heads import Heads
from mimref.refinement.method import Method, StepValues, monitored_values, neighbour_accuracy
from mimref.training.optim import adamw, module_groups, set_learning_rate
from tests.steps import (
    ARCHITECTURE,
    BLOCKS,
    CONFIG,
    CPU,
    IMAGES,
    QUEUE,
    SEED,
    TEMPERATURE,
    make_batch,
    make_step,
    weights,
)


def run(step: Method, batch: ViewBatch, *, top_k: int = 3, train_encoder: bool = True) -> StepValues:
    heads = len(step.block_of_head)
    return step.forward(batch, weights(heads), top_k=top_k, train_encoder=train_encoder)


# ---- A plain step: one view, one head, one anchor at a time.


def plain_view_features(step: Method, batch: ViewBatch, block: int, pool: str) -> list[Tensor]:
    """Return the pooled tokens (B, D) of every view, computed with the encoder's own layers."""
    vit, found, view = step.encoder.vit, [], 0
    for crops in batch.crops:
        for column in range(crops.shape[1]):
            images = step.photometric(crops[:, column : column + 1], batch.epoch, batch.sample_B, [view])[0]
            tokens = step.encoder.embed(images)
            for layer in vit.blocks[:block]:
                tokens = layer(tokens)
            if block == 4:
                tokens = vit.norm(tokens)
            found.append(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
            view += 1
    return found


def plain_layers(layers: nn.Sequential, head: int, x: Tensor) -> Tensor:
    """Compute one head's projector or predictor with batch statistics, as formulas."""
    for number, layer in enumerate(layers, start=1):
        width = layer.linear.weight.shape[1]
        own = slice(head * width, (head + 1) * width)
        x = x @ layer.linear.weight[head].T
        mean = x.mean(dim=0)
        variance = ((x - mean) ** 2).mean(dim=0)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * layer.norm.weight[own] + layer.norm.bias[own]
        if number < len(layers):
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return x


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(dim=1, keepdim=True).sqrt()


def plain_neighbour(queue: Queue, head: int, query: Tensor, sample: int, choice: float, top_k: int) -> Tensor:
    ranked = sorted(
        ((float(query @ queue.rows_HQO[head, row]), row) for row in range(QUEUE) if int(queue.sample_Q[row]) != sample),
        reverse=True,
    )
    return queue.rows_HQO[head, ranked[int(choice * top_k)][1]]


def plain_step(step: Method, batch: ViewBatch, top_k: int, pool: str) -> tuple[Tensor, list[Tensor]]:
    """Return the weighted loss of Eq. (1) and every head's projections of view 0. The queue is read, not changed."""
    samples = batch.sample_B.tolist()
    total = torch.zeros((), dtype=torch.float64)
    to_enqueue = []
    for head, index in enumerate(step.block_of_head):
        features = plain_view_features(step, batch, step.wanted[index], pool)
        views = len(features)
        projected = plain_layers(step.heads.projector, head, torch.cat(features))
        p = unit(plain_layers(step.heads.predictor, head, projected)).split(len(samples))
        with torch.no_grad():
            z = unit(projected.detach().clone()).split(len(samples))[:2]
            draws = [
                uniform(SEED, batch.epoch, Operation.NEIGHBOUR, batch.sample_B, g, count=len(step.block_of_head))
                for g in (0, 1)
            ]
            neighbours = [
                [
                    plain_neighbour(step.queue, head, z[g][i], samples[i], float(draws[g][i, head]), top_k)
                    for i in range(len(samples))
                ]
                for g in (0, 1)
            ]
        tau = float(step.temperature_H[head])
        terms = []
        for g in (0, 1):
            for v in range(views):
                for i in range(len(samples)):
                    if v == g:
                        continue
                    positive = torch.exp(p[v][i] @ neighbours[g][i] / tau)
                    negatives = [torch.exp(p[v][i] @ z[g][j] / tau) for j in range(len(samples)) if j != i]
                    terms.append(-torch.log(positive / (positive + torch.stack(negatives).sum())))
        assert len(terms) == 2 * (views - 1) * len(samples)
        total = total + weights(3)[head] * torch.stack(terms).mean()
        to_enqueue.append(z[0])
    return total, to_enqueue


def gradients(step: Method) -> dict[str, Tensor | None]:
    named = [*step.encoder.named_parameters(prefix="encoder"), *step.heads.named_parameters(prefix="heads")]
    return {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in named}


@pytest.mark.parametrize(("pool", "local_views"), [("cls", 2), ("mean", 1), ("cls", 0)])
def test_step_equals_a_plain_step_in_loss_gradients_and_queue(pool: str, local_views: int) -> None:
    ours, plain = make_step(pool=pool), make_step(pool=pool)
    # The second batch meets entries of the first, including its own; all statistics are those of training mode.
    for epoch, samples in enumerate([range(IMAGES), range(2, 2 + IMAGES)]):
        batch = make_batch(samples, local_views=local_views, epoch=epoch)
        for step in (ours, plain):
            step.encoder.zero_grad()
            step.heads.zero_grad()
        values = run(ours, batch)
        values.loss.backward()
        loss, to_enqueue = plain_step(plain, batch, 3, pool)
        # Candidates carry no gradient in the plain step: all gradient flows through the anchor.
        loss.backward()
        torch.testing.assert_close(values.loss, loss, rtol=1e-10, atol=1e-12)

        found, expected = gradients(ours), gradients(plain)
        assert [name for name, gradient in found.items() if gradient is None] == ["encoder.vit.pos_embed"]
        norm = math.sqrt(sum(float((g * g).sum()) for g in expected.values() if g is not None))
        for name, gradient in expected.items():
            if gradient is not None:
                difference = float((found[name] - gradient).norm())  # type: ignore[operator]
                assert difference < 1e-10 * norm, name
        for part in ("encoder.vit.patch_embed", "encoder.vit.norm.", "heads.projector.0.linear", "heads.predictor.1"):
            assert any(
                float(g.norm()) > 1e-4 * norm for n, g in expected.items() if n.startswith(part) and g is not None
            )

        plain.queue.enqueue(torch.stack(to_enqueue), batch.sample_B)
        torch.testing.assert_close(ours.queue.rows_HQO, plain.queue.rows_HQO, rtol=1e-10, atol=1e-12)
        assert torch.equal(ours.queue.sample_Q, plain.queue.sample_Q)
        assert ours.queue.position == plain.queue.position == IMAGES * (epoch + 1)


def test_heads_get_the_gradient_of_a_frozen_encoder() -> None:
    frozen, trained = make_step(), make_step()
    run(frozen, make_batch(), train_encoder=False).loss.backward()
    run(trained, make_batch(), train_encoder=True).loss.backward()
    assert all(parameter.grad is None for parameter in frozen.encoder.parameters())
    for ours, theirs in zip(frozen.heads.parameters(), trained.heads.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_stage_1_leaves_the_encoder_to_the_bit() -> None:
    step = make_step()
    before = {name: value.clone() for name, value in step.encoder.state_dict().items()}
    heads_before = [parameter.detach().clone() for parameter in step.heads.parameters()]
    optimizer = adamw(module_groups(step.heads, weight_decay=1e-5), betas=(0.9, 0.95))
    set_learning_rate(optimizer, 1e-2)
    for epoch in range(2):
        run(step, make_batch(epoch=epoch), top_k=1, train_encoder=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in step.encoder.state_dict().items())
    assert not step.encoder.training
    moved = zip(step.heads.parameters(), heads_before, strict=True)
    assert not any(torch.equal(now, then) for now, then in moved)


# ---- Which head reads what.


class LabelledEncoder(nn.Module):
    """An encoder whose tokens identify their block, view and image: 100 * block + mean pixel."""

    architecture = ARCHITECTURE
    embed_dim = 32

    def blocks(self, images: Tensor, indices: Sequence[int], *, final_norm: bool = False) -> list[Tensor]:
        assert final_norm
        return [(100 * block + images.mean(dim=(1, 2, 3)))[:, None, None].expand(-1, 5, 32) for block in indices]

    def pool(self, tokens_BLD: Tensor, how: str) -> Tensor:
        return tokens_BLD[:, 0]


@pytest.mark.parametrize("blocks", [[1, 2, 3], [4, 2, 3], [3, 3, 1]])
def test_head_i_reads_block_i_and_rows_go_view_by_view(blocks: list[int]) -> None:
    step = make_step(blocks, encoder=LabelledEncoder())
    batch = make_batch(local_views=3)
    (features_HND,) = step.features(batch, train_encoder=False)
    assert features_HND.shape == (3, 5 * IMAGES, 32)
    rows = []
    view = 0
    for crops in batch.crops:
        for column in range(crops.shape[1]):
            seen = step.photometric(crops[:, column : column + 1], 0, batch.sample_B, [view])
            rows.append(seen[0].mean(dim=(1, 2, 3)))
            view += 1
    for head, block in enumerate(blocks):
        expected = (100 * block + torch.cat(rows))[:, None].expand(-1, 32)
        torch.testing.assert_close(features_HND[head], expected)


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_last_block_is_read_through_the_final_norm_and_others_raw(post_norm: bool) -> None:
    step = make_step([4, 2, 4], post_norm=post_norm)
    outputs: dict[int, list[Tensor]] = {}
    for number, block in enumerate(step.encoder.vit.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, number=number: outputs.setdefault(number, []).append(out))
    (features_HND,) = step.features(make_batch(), train_encoder=False)
    assert len(outputs[4]) == 2  # one pass per crop size
    with torch.inference_mode():  # because the hooks' outputs are inference tensors
        last = torch.cat([step.encoder.vit.norm(out)[:, 0] for out in outputs[4]])
    raw = torch.cat([out[:, 0] for out in outputs[4]])
    assert torch.equal(last, raw) == post_norm  # post-norm encoders have no final norm
    assert torch.equal(features_HND[0], last) and torch.equal(features_HND[2], last)
    assert torch.equal(features_HND[1], torch.cat([out[:, 0] for out in outputs[2]]))


def test_features_carry_a_gradient_only_when_the_encoder_trains() -> None:
    step = make_step()
    assert not step.features(make_batch(), train_encoder=False)[0].requires_grad
    assert step.features(make_batch(), train_encoder=True)[0].requires_grad


# ---- Neighbours and queue.


def test_view_0_is_enqueued_after_the_lookup() -> None:
    step = make_step()
    batch = make_batch()
    projection, _ = make_step().heads(*make_step().features(batch, train_encoder=False))
    values = run(step, batch)
    assert bool((values.neighbours.sample_HM == -1).all())
    assert step.queue.sample_Q.tolist() == batch.sample_B.tolist() + [-1] * (QUEUE - IMAGES)
    torch.testing.assert_close(step.queue.rows_HQO[:, :IMAGES], projection[:, :IMAGES], rtol=1e-12, atol=1e-12)
    assert not step.queue.rows_HQO.requires_grad
    again = run(step, batch, top_k=QUEUE - 3)
    own = batch.sample_B.repeat(2)
    assert bool((again.neighbours.sample_HM != own).all()) and bool((again.neighbours.sample_HM >= 0).any())


def recorded_choices(step: Method, batch: ViewBatch, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Return the choices that the lookup receives, by (sample, view)."""
    seen: dict[Any, Any] = {}
    search = step.queue.swap_neighbours

    def record(query: Tensor, sample_M: Tensor, choice_HM: Tensor, *, top_k: int) -> Neighbours:
        for row, sample in enumerate(sample_M.tolist()):
            seen[sample, row // len(batch.sample_B)] = tuple(choice_HM[:, row].tolist())
        return search(query, sample_M, choice_HM, top_k=top_k)

    monkeypatch.setattr(step.queue, "swap_neighbours", record)
    run(step, batch)
    return seen


def test_choices_follow_seed_epoch_sample_and_view_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recorded_choices(make_step(), make_batch([4, 9, 2, 7]), monkeypatch)
    other = recorded_choices(make_step(), make_batch([1, 2, 30, 4, 5], local_views=0), monkeypatch)
    assert len(first) == 8
    for key in [(4, 0), (4, 1), (2, 0), (2, 1)]:
        assert first[key] == other[key]
    assert len({value for choices in first.values() for value in choices}) == 8 * len(BLOCKS)
    next_epoch = recorded_choices(make_step(), make_batch([4, 9, 2, 7], epoch=1), monkeypatch)
    reseeded = make_step()
    reseeded.photometric.seed = SEED + 1
    for changed in (next_epoch, recorded_choices(reseeded, make_batch([4, 9, 2, 7]), monkeypatch)):
        assert changed.keys() == first.keys() and not set(changed.values()) & set(first.values())


@pytest.mark.parametrize("direction", ["projection", "prediction"])
def test_the_order_of_a_batch_does_not_matter(direction: str) -> None:
    order = [3, 0, 4, 1, 2]
    straight, shuffled = make_step(direction=direction), make_step(direction=direction)
    for epoch in range(2):
        expected = run(straight, make_batch(epoch=epoch))
        values = run(shuffled, make_batch(order, epoch=epoch))
        torch.testing.assert_close(values.loss, expected.loss, rtol=1e-10, atol=1e-12)
        both = torch.tensor(order + [IMAGES + sample for sample in order])
        for ours, theirs in zip(values.neighbours, expected.neighbours, strict=True):
            torch.testing.assert_close(ours, theirs[:, both], rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(values.alignment, expected.alignment, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("swap_negatives", [False, True])
@pytest.mark.parametrize("direction", ["projection", "prediction"])
def test_options_reach_the_loss(direction: str, swap_negatives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def note(*tensors: Tensor, **options: Any) -> Alignment:
        given.update(options, shapes=[tuple(tensor.shape) for tensor in tensors], temperature=tensors[3])
        given["swapped"] = torch.equal(tensors[1], tensors[2])
        loss_H = tensors[0].mean(dim=(1, 2, 3))
        return Alignment(loss_H, loss_H.detach(), loss_H.detach())

    monkeypatch.setattr(step_module, "nna_loss", note)
    run(make_step(direction=direction, swap_negatives=swap_negatives), make_batch())
    assert (given["direction"], given["swapped"]) == (direction, swap_negatives)
    assert given["shapes"] == [(3, 4, IMAGES, 6), (3, 2, IMAGES, 6), (3, 2, IMAGES, 6), (3,)]
    assert given["temperature"].tolist() == pytest.approx(TEMPERATURE)


def test_the_loss_weights_the_heads() -> None:
    values = run(make_step(), make_batch())
    expected = sum(w * float(loss) for w, loss in zip([1.0, 0.4, 2.0], values.alignment.loss_H.detach(), strict=True))
    assert float(values.loss.detach()) == pytest.approx(expected)


# ---- What is logged.


def test_neighbour_accuracy_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (40,), generator=generator)
    sample_B = torch.randperm(40, generator=generator)[:7]
    found = torch.randint(-1, 40, (4, 14), generator=generator)
    found[3] = -1
    neighbours = Neighbours(torch.zeros(4, 14, 2), torch.zeros(4, 14), found, torch.zeros(4, 14))
    expected = []
    for head in range(4):
        hits = 0
        for m in range(14):
            own, other = int(sample_B[m % 7]), int(found[head, m])
            hits += other >= 0 and int(labels[other]) == int(labels[own])
        expected.append(100 * hits / 14)
    assert neighbour_accuracy(neighbours, sample_B, labels).tolist() == pytest.approx(expected)
    assert expected[3] == 0 and 0 < expected[0] < 100


@pytest.mark.parametrize("local_views", [0, 2])
@pytest.mark.parametrize("labelled", [False, True])
def test_monitored_values_are_those_of_the_step(local_views: int, labelled: bool) -> None:
    step = make_step()
    run(step, make_batch(local_views=local_views))
    values = run(step, make_batch(local_views=local_views, epoch=1))
    labels = torch.tensor([0, 1, 0, 1, 0])
    logged = monitored_values(values, labels if labelled else None)
    expected = {
        "loss": float(values.loss.detach()),
        "head_loss": values.alignment.loss_H.tolist(),
        "alignment_global": values.alignment.global_H.tolist(),
        "nn_similarity": values.neighbours.similarity_HM.mean(dim=1).tolist(),
        "nn_age": values.neighbours.age_HM.double().mean(dim=1).tolist(),
    }
    if local_views:
        expected["alignment_local"] = values.alignment.local_H.tolist()
    if labelled:
        expected["nn_accuracy"] = neighbour_accuracy(values.neighbours, values.sample_B, labels).tolist()
    assert logged == expected
    # Random rows and the first step's rows are one update old.
    assert logged["nn_age"] == [1.0, 1.0, 1.0]


def test_bfloat16_autocast_keeps_loss_and_queue_in_float32() -> None:
    torch.manual_seed(0)
    encoder: Encoder = build_encoder(ARCHITECTURE)
    step = Method(
        encoder,
        Heads(CONFIG, [32] * 3),
        Queue(3, QUEUE, CONFIG.output, generator=torch.Generator().manual_seed(1), device=CPU),
        Photometric(ViewsConfig(), SEED, CPU),
        blocks=BLOCKS,
        temperature=TEMPERATURE,
        pool="cls",
        loss=LossConfig(),
        precision=torch.bfloat16,
    )
    values = step.forward(make_batch(), torch.ones(3), top_k=3, train_encoder=True)
    values.loss.backward()
    assert values.loss.dtype is values.neighbours.rows_HMO.dtype is step.queue.rows_HQO.dtype is torch.float32
    torch.testing.assert_close(step.queue.rows_HQO.norm(dim=2), torch.ones(3, QUEUE))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in encoder.parameters())
