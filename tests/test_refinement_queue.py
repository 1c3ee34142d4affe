"""The queue against a plain list that forgets its oldest entries, and a lookup one query at a time."""

from collections import deque
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mimref.refinement.alignment as queue_module
from mimref.refinement.alignment import Neighbours, Queue

HEADS, WIDTH = 2, 4


def make_queue(size: int, heads: int = HEADS, seed: int = 0) -> Queue:
    """Return a queue in float64."""
    queue = Queue(heads, size, WIDTH, generator=torch.Generator().manual_seed(seed), device=torch.device("cpu"))
    queue.rows_HQO = F.normalize(queue.rows_HQO.double(), dim=2)
    return queue


def unit_rows(count: int, seed: int, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(heads, count, WIDTH, generator=generator, dtype=torch.float64), dim=2)


class Entry(NamedTuple):
    """An entry of the queue, with one row per head."""

    rows: list[list[float]]
    sample: int
    update: int


class PlainQueue:
    """A list of entries, oldest first."""

    def __init__(self, queue: Queue) -> None:
        rows = queue.rows_HQO.transpose(0, 1).tolist()
        self.entries = deque((Entry(row, -1, 0) for row in rows), maxlen=len(rows))
        self.updates = 0

    def enqueue(self, rows_HMO: Tensor, samples: list[int]) -> None:
        for row, sample in zip(rows_HMO.transpose(0, 1).tolist(), samples, strict=True):
            self.entries.append(Entry(row, sample, self.updates))
        self.updates += 1

    def neighbour(self, head: int, query: list[float], sample: int, rank: int) -> tuple[float, Entry]:
        ranked = sorted(
            (
                (sum(q * x for q, x in zip(query, entry.rows[head], strict=True)), position)
                for position, entry in enumerate(self.entries)
                if entry.sample != sample
            ),
            reverse=True,
        )
        similarity, position = ranked[rank]
        return similarity, self.entries[position]


def oldest_first(queue: Queue) -> list[Entry]:
    order = [(queue.position + place) % len(queue) for place in range(len(queue))]
    rows = queue.rows_HQO.transpose(0, 1)
    return [Entry(rows[at].tolist(), int(queue.sample_Q[at]), int(queue.update_Q[at])) for at in order]


def assert_equal_lookup(found: Neighbours, plain: PlainQueue, query: Tensor, samples: Tensor, rank: Tensor) -> None:
    for head in range(query.shape[0]):
        for m in range(query.shape[1]):
            similarity, entry = plain.neighbour(head, query[head, m].tolist(), int(samples[m]), int(rank[head, m]))
            assert found.rows_HMO[head, m].tolist() == entry.rows[head]
            assert float(found.similarity_HM[head, m]) == pytest.approx(similarity, abs=1e-12)
            assert int(found.sample_HM[head, m]) == entry.sample
            assert int(found.age_HM[head, m]) == plain.updates - entry.update


def test_initial_rows_are_unit_vectors_without_a_sample() -> None:
    queue = Queue(3, 50, 7, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert len(queue) == 50
    assert queue.rows_HQO.shape == (3, 50, 7) and queue.rows_HQO.dtype is torch.float32
    torch.testing.assert_close(queue.rows_HQO.norm(dim=2), torch.ones(3, 50))
    assert queue.sample_Q.tolist() == [-1] * 50
    assert queue.rows_HQO.flatten(0, 1).unique(dim=0).shape[0] == 150
    again = Queue(3, 50, 7, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert torch.equal(again.rows_HQO, queue.rows_HQO)


@pytest.mark.parametrize(
    "sizes", [[5, 5, 5, 5], [3] * 9, [10] * 3, [4, 1, 7, 2, 9, 3], [23, 4, 11, 10], [1] * 25, [35, 7]]
)
def test_rows_leave_in_the_order_they_came(sizes: list[int]) -> None:
    # 10 rows: batches that divide the queue, do not divide it, fill it, and overrun it.
    queue = make_queue(10)
    plain = PlainQueue(queue)
    first = 0
    for number, size in enumerate(sizes):
        rows, samples = unit_rows(size, seed=number + 1), list(range(first, first + size))
        queue.enqueue(rows, torch.tensor(samples))
        plain.enqueue(rows, samples)
        first += size
        assert oldest_first(queue) == list(plain.entries)
    assert queue.updates == len(sizes)


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_lookup_equals_plain_loops(top_k: int) -> None:
    queue = make_queue(12)
    plain = PlainQueue(queue)
    generator = torch.Generator().manual_seed(top_k)
    for number in range(5):
        # Every sample returns after two batches, so that the queue contains entries of the query's own sample.
        samples = torch.arange(5) + 5 * (number % 2)
        query = unit_rows(5, seed=100 + number)
        rank = torch.randint(0, top_k, (HEADS, 5), generator=generator)
        found = queue.swap_neighbours(query, samples, (rank + 0.5) / top_k, top_k=top_k)
        assert_equal_lookup(found, plain, query, samples, rank)
        rows = unit_rows(5, seed=number)
        queue.enqueue(rows, samples)
        plain.enqueue(rows, samples.tolist())


def test_own_entries_are_never_returned() -> None:
    queue = make_queue(9)
    own = unit_rows(1, seed=3)
    # Sample 7 is in the queue twice with exactly the row of the query; sample 8 has the same row.
    rows = torch.cat([own, unit_rows(3, seed=4), own, own], dim=1)
    queue.enqueue(rows, torch.tensor([7, 1, 2, 3, 7, 8]))
    for rank in range(7):
        found = queue.swap_neighbours(own, torch.tensor([7]), torch.full((HEADS, 1), (rank + 0.5) / 7), top_k=7)
        assert 7 not in found.sample_HM.tolist()[0] + found.sample_HM.tolist()[1]
        assert bool(found.similarity_HM.isfinite().all())
    best = queue.swap_neighbours(own, torch.tensor([7]), torch.zeros(HEADS, 1), top_k=1)
    assert best.sample_HM.tolist() == [[8], [8]]
    torch.testing.assert_close(best.similarity_HM, torch.ones(HEADS, 1, dtype=torch.float64))
    assert torch.equal(best.rows_HMO, own)
    # Another sample does find them; random rows carry no sample, so nothing is masked for them.
    assert queue.swap_neighbours(own, torch.tensor([1]), torch.zeros(HEADS, 1), top_k=1).sample_HM[0, 0] in (7, 8)


@pytest.mark.parametrize("top_k", [2, 3, 7, 20, 29])
def test_the_draw_is_uniform_over_the_best_rows(top_k: int) -> None:
    queue = make_queue(30)
    plain = PlainQueue(queue)
    query = unit_rows(1, seed=9)
    # The ranks get equal shares of [0, 1); the largest float32 below 1 still belongs to the last one.
    shares = [(rank / top_k + 1e-6, rank) for rank in range(top_k)]
    shares += [((rank + 1) / top_k - 1e-6, rank) for rank in range(top_k)]
    shares += [(0.0, 0), (1 - 2**-24, top_k - 1)]
    choice = torch.tensor([share for share, _ in shares], dtype=torch.float32).expand(HEADS, -1)
    rank = torch.tensor([rank for _, rank in shares]).expand(HEADS, -1)
    many, samples = query.expand(-1, len(shares), -1), torch.zeros(len(shares), dtype=torch.int64)
    found = queue.swap_neighbours(many, samples, choice, top_k=top_k)
    assert_equal_lookup(found, plain, many, samples, rank)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("queries_at_once", [1, 3, 16])
def test_chunks_do_not_change_the_result(top_k: int, queries_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue(20)
    queue.enqueue(unit_rows(15, seed=1), torch.arange(15))
    query, samples = unit_rows(16, seed=2), torch.arange(16)
    choice = torch.rand(HEADS, 16, generator=torch.Generator().manual_seed(0))
    whole = queue.swap_neighbours(query, samples, choice, top_k=top_k)
    sizes = []
    search = Queue._search

    def recorded(self: Queue, query_HMO: Tensor, *rest: object) -> object:
        sizes.append(query_HMO.shape[1])
        return search(self, query_HMO, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Queue, "_search", recorded)
    monkeypatch.setattr(queue_module, "_LOOKUP_ELEMENTS", queries_at_once * HEADS * 20)
    parts = queue.swap_neighbours(query, samples, choice, top_k=top_k)
    assert max(sizes) == queries_at_once and sum(sizes) == 16
    assert torch.equal(parts.rows_HMO, whole.rows_HMO)
    assert torch.equal(parts.sample_HM, whole.sample_HM) and torch.equal(parts.age_HM, whole.age_HM)
    torch.testing.assert_close(parts.similarity_HM, whole.similarity_HM, rtol=1e-12, atol=1e-12)


def test_heads_search_their_own_rows() -> None:
    queue = make_queue(8, heads=3)
    query = unit_rows(5, seed=1, heads=3)
    together = queue.swap_neighbours(query, torch.arange(5), torch.zeros(3, 5), top_k=1)
    for head in range(3):
        alone = make_queue(8, heads=1)
        alone.rows_HQO = queue.rows_HQO[head : head + 1].clone()
        found = alone.swap_neighbours(query[head : head + 1], torch.arange(5), torch.zeros(1, 5), top_k=1)
        assert torch.equal(found.rows_HMO[0], together.rows_HMO[head])


def test_results_carry_no_gradient() -> None:
    queue = make_queue(8)
    query = unit_rows(3, seed=1).requires_grad_()
    found = queue.swap_neighbours(query, torch.arange(3), torch.zeros(HEADS, 3), top_k=2)
    assert not found.rows_HMO.requires_grad and not found.similarity_HM.requires_grad
    queue.enqueue(query, torch.arange(3))
    assert not queue.rows_HQO.requires_grad


def test_results_do_not_change_when_the_queue_does() -> None:
    queue = make_queue(4)
    found = queue.swap_neighbours(unit_rows(2, seed=1), torch.arange(2), torch.zeros(HEADS, 2), top_k=1)
    before = [tensor.clone() for tensor in found]
    queue.enqueue(unit_rows(4, seed=2), torch.arange(4))
    assert all(torch.equal(now, then) for now, then in zip(found, before, strict=True))


def test_a_restored_queue_goes_on_alike() -> None:
    queue = make_queue(10)
    for number in range(3):
        queue.enqueue(unit_rows(4, seed=number), torch.arange(4 * number, 4 * number + 4))
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in queue.state_dict().items()}
    other = make_queue(10, seed=1)
    other.load_state_dict(state)
    for each in (queue, other):
        each.enqueue(unit_rows(4, seed=9), torch.arange(12, 16))
    assert (other.position, other.updates) == (queue.position, queue.updates) == (6, 4)
    assert oldest_first(other) == oldest_first(queue)
    query, samples = unit_rows(3, seed=10), torch.tensor([15, 9, 0])
    ours, theirs = (
        each.swap_neighbours(query, samples, torch.full((HEADS, 3), 0.7), top_k=3) for each in (queue, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_queue_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError):
        make_queue(10).load_state_dict(make_queue(12).state_dict())
