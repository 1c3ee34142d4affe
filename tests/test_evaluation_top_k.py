"""The running top-k against a stable sort of all columns."""

import pytest
import torch
from torch import Tensor

from mimref.evaluation.knn.top_k import largest, merge_top_k, pack, unpack


def sorted_whole(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    value, index = similarity.sort(dim=1, descending=True, stable=True)
    return value[:, :k], index[:, :k]


def in_chunks(similarity: Tensor, edges: list[int], k: int) -> tuple[Tensor, Tensor]:
    best = None
    for start, stop in zip([0, *edges], [*edges, similarity.shape[1]], strict=True):
        best = merge_top_k(best, similarity[:, start:stop].contiguous(), start, k)
    assert best is not None
    return unpack(best)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("edges", [[], [1000], [30, 500, 501, 1900]])
@pytest.mark.parametrize("levels", [0, 2, 40, 900])
def test_equals_a_stable_sort(k: int, edges: list[int], levels: int) -> None:
    generator = torch.Generator().manual_seed(k)
    similarity = 2 * torch.rand(9, 2000, generator=generator) - 1
    if levels:  # few distinct values make many ties; some are negative zeros
        similarity = (similarity * levels).trunc() / levels
    similarity[3] = 0.25
    similarity[4] = similarity[4].sort().values
    similarity[5] = similarity[5].sort(descending=True).values
    value, index = in_chunks(similarity, edges, k)
    expected = sorted_whole(similarity, k)
    assert torch.equal(value, expected[0])
    assert torch.equal(index, expected[1])


def test_fewer_columns_than_k() -> None:
    similarity = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    assert unpack(merge_top_k(None, similarity, 0, 9))[0].shape == (3, 5)


def test_keys_hold_any_similarity_and_column() -> None:
    similarity = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 1e-45, 0.5, 1.0, 3e38])
    column = torch.tensor([0, 2**32 - 1, 5, 6, 7, 2**31, 9, 1])
    keys = pack(similarity, column)
    assert bool((keys.diff() > 0).all())
    value, index = unpack(keys)
    assert torch.equal(value, similarity)
    assert torch.equal(index, column)
    equal = pack(torch.tensor([0.0, -0.0, 0.0]), torch.tensor([1, 2, 3]))
    assert bool((equal.diff() < 0).all())


def test_largest_come_first() -> None:
    values = torch.tensor([[3, 1, 2], [4, 6, 5]])
    assert largest(values, 2).tolist() == [[3, 2], [6, 5]]
    assert largest(values, 5).tolist() == [[3, 2, 1], [6, 5, 4]]
