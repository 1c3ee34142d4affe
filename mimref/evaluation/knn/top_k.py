"""The top-k of similarities that arrive in chunks of columns, exact and in a defined order.

A similarity and its column are packed into one 64-bit key, whose order is: larger similarity first, then lower column.
No two keys are equal, so a top-k of keys has a single answer, whatever the device or chunk size.

Sorting is expensive, so most similarities never become keys. Once k columns have been seen, the k-th best of them is a
bar that later ones must clear. For the first chunk the bar comes from maxima over disjoint groups of columns: at least
k columns reach the k-th largest of these maxima, so nothing below it is among the k best. With a little over 2k groups,
about 1.3k columns clear it when neighbours come in random order.
"""

import numpy as np
import torch
from torch import Tensor

INDEX_BITS = 32
INDEX_MASK = (1 << INDEX_BITS) - 1
LOWEST = torch.iinfo(torch.int64).min
# Keys made at once when too many columns clear the bar: 32 MB.
KEYS_AT_ONCE = 1 << 22


def merge_top_k(best: Tensor | None, similarity_MN: Tensor, start: int, k: int) -> Tensor:
    """Return the k best keys (M, k) of `best` and new similarities, best first; fewer until k columns have been seen.

    best: keys of earlier columns, or None. similarity_MN: float32, of columns start..start+N-1, which are above all
    earlier ones and below 2^32.
    """
    M, N = similarity_MN.shape
    if best is not None and best.shape[1] == k:
        # A later column loses a tie.
        clears = similarity_MN > unpack(best[:, -1:])[0]
    else:
        bar = _group_bar(similarity_MN, k)
        if bar is None:
            return _merge_all(best, similarity_MN, start, k)
        clears = similarity_MN >= bar
    flat = clears.view(-1).nonzero()[:, 0]
    # Where each row's part of `flat` begins; counting booleans along rows is far slower.
    edges = torch.searchsorted(flat, torch.arange(M + 1, device=flat.device) * N)
    counts = edges.diff()
    width = int(counts.max())
    if width > N // 4:
        # Rows have many equal similarities, as with collapsed features.
        return _merge_all(best, similarity_MN, start, k)
    row = torch.repeat_interleave(counts)
    keys = pack(similarity_MN.view(-1).index_select(0, flat), flat - row * N + start)
    padded = torch.full((M, width), LOWEST, device=flat.device)
    place = row * width - edges.index_select(0, row) + torch.arange(len(flat), device=flat.device)
    padded.view(-1).index_copy_(0, place, keys)
    return largest(padded if best is None else torch.cat([best, padded], dim=1), k)


def pack(similarity: Tensor, column: Tensor) -> Tensor:
    """Return int64 keys, the larger the better. similarity: float32; column: int64, 0 to 2^32 - 1."""
    # Adding zero turns -0.0 into 0.0, which compares equal.
    ordered = _reverse_negative((similarity + 0.0).view(torch.int32))
    return (ordered.long() << INDEX_BITS).add_(INDEX_MASK).sub_(column)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities (float32) and columns (int64) of keys."""
    ordered = (keys >> INDEX_BITS).to(torch.int32)
    return _reverse_negative(ordered).view(torch.float32), unpack_columns(keys)


def unpack_columns(keys: Tensor) -> Tensor:
    """Return the columns (int64) of keys."""
    return INDEX_MASK - (keys & INDEX_MASK)


def _reverse_negative(bits: Tensor) -> Tensor:
    """Reverse the order of negative floats' bits (int32), so that all bits sort like the floats; its own inverse."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _group_bar(similarity_MN: Tensor, k: int) -> Tensor | None:
    """Return similarities (M, 1) that at least k columns of each row reach; None for too few columns to group."""
    size = similarity_MN.shape[1] // (2 * k + 64)
    if size < 2:
        return None
    groups = similarity_MN.shape[1] // size
    # Adjacent columns, often of one class, fall into different groups. Leaving out the last ones only lowers the bar.
    maxima = similarity_MN[:, : groups * size].unflatten(1, (size, groups)).amax(dim=1)
    return largest(maxima, k)[:, -1:]


def _merge_all(best: Tensor | None, similarity_MN: Tensor, start: int, k: int) -> Tensor:
    """Do the work of `merge_top_k` with the keys of all columns, some rows at a time."""
    M, N = similarity_MN.shape
    columns = torch.arange(start, start + N, device=similarity_MN.device).expand(M, N)
    step = max(1, KEYS_AT_ONCE // N)
    parts = []
    for rows in (slice(first, first + step) for first in range(0, M, step)):
        keys = pack(similarity_MN[rows], columns[rows])
        parts.append(largest(keys if best is None else torch.cat([best[rows], keys], dim=1), k))
    return torch.cat(parts)


def largest(values_MN: Tensor, k: int) -> Tensor:
    """Return the k largest values of every row (all of them if there are fewer), largest first."""
    if values_MN.device.type == "cpu":
        # numpy sorts whole rows with vector instructions, ten times faster than torch's top-k on the CPU.
        return torch.from_numpy(np.sort(values_MN.numpy(), axis=1)[:, : -k - 1 : -1].copy())
    return values_MN.topk(min(k, values_MN.shape[1]), dim=1).values
