"""Position embeddings of foreign files: finding their grid of patches, and making it square, as encoders here need.

Shapes: N patches, D width, P prefix tokens.
"""

import math

import torch
from torch import Tensor

from mimref.config.base import Interpolation
from mimref.encoders.parts import Unrecognised
from mimref.encoders.positions import flat_sincos_positions, resize_positions

Grid = tuple[int, int]
"""Rows and columns of patches."""

# Image size in pixels of MAE-pytorch's models, unless a grid is set.
_FLAT_IMAGE_SIZE = 224


def prepare_positions(
    tensors: dict[str, Tensor], asked: Grid | None, notices: list[str], interpolation: Interpolation = "mae"
) -> Grid:
    """Bring the position embedding to (1, 1 + N, D), or to (1, N, D) with registers or without a CLS token.

    In the second form, the positions of CLS and register tokens are added to the tokens themselves, which computes the
    same function. A grid that is not square is interpolated to a square. Returns the file's grid.
    asked: the grid, if it cannot be inferred.
    """
    positions = tensors.get("pos_embed")
    if positions is None:
        raise Unrecognised("has no position embedding (pos_embed), which a plain vision transformer needs")
    if positions.layout is not torch.strided or positions.is_meta:
        raise Unrecognised("pos_embed is sparse or without data")
    is_batch_of_one = positions.ndim == 2 or (positions.ndim in (3, 4) and len(positions) == 1)
    if not is_batch_of_one or not positions.is_floating_point():
        raise Unrecognised(f"has positions of shape {tuple(positions.shape)} and type {positions.dtype}")
    tokens = {name: tensors[name] for name in ("cls_token", "reg_token") if name in tensors}
    for token in tokens.values():
        if token.ndim != 3 or len(token) != 1:
            raise Unrecognised(f"has a CLS or register token of shape {tuple(token.shape)}")
    count, grid = _find_grid(positions, [token.shape[1] for token in tokens.values()], asked)
    if grid[0] != grid[1] and not asked and positions.ndim != 4:
        shape = f"{grid[0]} x {grid[1]}"
        notices.append(
            f"a grid of {shape} patches is assumed; encoder.grid (--grid of inspect, export and push) sets another"
        )
    flat = positions.reshape(1, -1, positions.shape[-1])  # still the file's memory
    prefix_1PD, patches_1ND = flat[:, :count], _square(flat[:, count:], grid, notices, interpolation)
    if list(tokens) != ["cls_token"]:
        tensors["pos_embed"] = patches_1ND
        for name, token in tokens.items():
            rows, prefix_1PD = prefix_1PD[:, : token.shape[1]], prefix_1PD[:, token.shape[1] :]
            if rows.any():
                tensors[name] = token.float() + rows.float()
                notices.append(f"the position of {name} was added to the token")
    elif count and grid[0] == grid[1]:
        tensors["pos_embed"] = flat
    else:
        prefix_1PD = prefix_1PD if count else patches_1ND.new_zeros(1, 1, patches_1ND.shape[2])
        tensors["pos_embed"] = torch.cat([prefix_1PD, patches_1ND], dim=1)
    return grid


def _find_grid(positions: Tensor, lengths: list[int], asked: Grid | None) -> tuple[int, Grid]:
    """Return the number of prefix tokens with positions, and the grid: a square, or the one nearest to a square.

    lengths: the number of CLS tokens and of register tokens.
    """
    shape = tuple(positions.shape)
    if positions.ndim == 4:
        rows, columns = shape[1:3]
        if asked not in (None, (rows, columns)):
            raise Unrecognised(f"has positions of {rows} x {columns} patches, not {asked}; omit encoder.grid")
        return 0, (rows, columns)
    # A CLS token usually has a position; registers usually have none.
    counts = [count for count in ((1, 0, sum(lengths)) if lengths else (0,)) if count < positions.shape[-2]]
    patches = {count: positions.shape[-2] - count for count in counts}
    if asked:
        count = next((count for count in counts if patches[count] == asked[0] * asked[1]), None)
        if count is None:
            raise Unrecognised(f"has positions of shape {shape}, which are not {asked[0]} x {asked[1]} patches")
        return count, asked
    grids = {count: _most_square(patches[count]) for count in counts}
    for count, (rows, columns) in grids.items():
        if rows == columns:
            return count, (rows, columns)
    # A grid of one row means a prime number of patches: another number of prefix tokens is more likely.
    for count, (rows, columns) in grids.items():
        if rows > 1:
            return count, (rows, columns)
    raise Unrecognised(f"has positions of shape {shape}, which is not a grid of patches of several rows")


def _most_square(patches: int) -> Grid:
    rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
    return rows, patches // rows


def _square(patches_1ND: Tensor, grid: Grid, notices: list[str], interpolation: Interpolation) -> Tensor:
    """Interpolate the positions of a grid to a square of its longer side."""
    (rows, columns), side = grid, max(grid)
    if rows == columns:
        return patches_1ND
    notices.append(f"positions of {rows} x {columns} patches were interpolated to {side} x {side}")
    return resize_positions(patches_1ND, (side, side), grid=grid, interpolation=interpolation)


def unsaved_positions(patch_size: int, width: int, asked: Grid | None, notices: list[str]) -> Tensor:
    """Return the positions of MAE-pytorch's models for 224 pixels, or for the grid asked for."""
    side = max(1, _FLAT_IMAGE_SIZE // patch_size)
    rows, columns = asked or (side, side)
    if not asked:
        notices.append(
            f"the file holds no positions: MAE-pytorch's fixed ones of {side} x {side} patches are used; "
            "encoder.grid (--grid of inspect, export and push) chooses another number"
        )
    return flat_sincos_positions(width, rows * columns)
