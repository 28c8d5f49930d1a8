"""The Hadamard transform of rotation.py inside Triton kernels, operation for operation.

A tile of vectors is a tuple of columns, each [TOKENS, LANES]: column p * GROUP + j of lane l holds coordinate
(p * LANES + l) * GROUP + j. With one lane a thread holds whole vectors and no step moves data between threads; with more
(a power of two, for the head sizes that are one) small batches spread over more threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rotation import outer_matrix, outer_order, random_signs


def signs_mask(head_size: int) -> int:
    """Bit i is set where random_signs(head_size)[i] is -1."""
    return sum(1 << i for i, sign in enumerate(random_signs(head_size).tolist()) if sign < 0)


def outer_masks(head_size: int) -> tuple[int, ...]:
    """One mask for each row of the outer matrix: bit j is set where entry j is -1."""
    rows = outer_matrix(outer_order(head_size)).tolist()
    return tuple(sum(1 << j for j, sign in enumerate(row) if sign < 0) for row in rows)


@triton.constexpr_function
def _signs_of_lanes(signs: int, column: int, lanes: int, group: int) -> int:
    """The bits of signs_mask that belong to a column: bit l for lane l."""
    piece, j = divmod(column, group)
    return sum((signs >> ((piece * lanes + lane) * group + j) & 1) << lane for lane in range(lanes))


@triton.jit
def split_columns(x, COUNT: tl.constexpr):
    """[TOKENS, LANES, COUNT] -> COUNT columns; COUNT is a power of two up to 256."""
    parts = (x,)
    for level in tl.static_range(8):
        if (COUNT >> level) > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                half = tl.reshape(parts[i], [x.shape[0], x.shape[1], 2, COUNT >> (level + 1)])
                first, second = tl.split(tl.permute(half, (0, 1, 3, 2)))
                halves = halves + (first, second)
            parts = halves
    columns = ()
    for c in tl.static_range(COUNT):
        columns = columns + (tl.reshape(parts[c], [x.shape[0], x.shape[1]]),)
    return columns


@triton.jit
def join_columns(columns, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Inverse of split_columns for columns FIRST .. FIRST + COUNT - 1."""
    parts = ()
    for c in tl.static_range(FIRST, FIRST + COUNT):
        parts = parts + (tl.reshape(columns[c], [columns[c].shape[0], columns[c].shape[1], 1]),)
    for level in tl.static_range(8):
        if (COUNT >> level) > 1:
            joined = ()
            for i in tl.static_range(0, COUNT >> level, 2):
                pair = tl.permute(tl.join(parts[i], parts[i + 1]), (0, 1, 3, 2))
                joined = joined + (tl.reshape(pair, [pair.shape[0], pair.shape[1], 2 << level]),)
            parts = joined
    return parts[0]


@triton.jit
def swap_lanes(x, lane, DISTANCE: tl.constexpr):
    """What lane ^ DISTANCE holds: x [TOKENS, LANES], lane [1, LANES]."""
    return tl.gather(x, tl.broadcast_to(lane ^ DISTANCE, x.shape), 1)


@triton.jit
def _change_signs(x, lane, SIGNS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    out = ()
    for c in tl.static_range(COUNT):
        if _signs_of_lanes(SIGNS, c, LANES, GROUP) == 0:
            out = out + (x[c],)
        elif _signs_of_lanes(SIGNS, c, LANES, GROUP) == (1 << LANES) - 1:
            out = out + (x[c] * -1.0,)
        else:
            negative = (_signs_of_lanes(SIGNS, c, LANES, GROUP) >> lane) & 1
            out = out + (x[c] * tl.where(negative != 0, -1.0, 1.0),)
    return out


@triton.jit
def _butterflies(x, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """Columns STRIDE apart become a + b and a - b."""
    out = ()
    for c in tl.static_range(COUNT):
        if c // STRIDE % 2 == 0:
            out = out + (x[c] + x[c + STRIDE],)
        else:
            out = out + (x[c - STRIDE] - x[c],)
    return out


@triton.jit
def _lane_butterflies(x, lane, COUNT: tl.constexpr, DISTANCE: tl.constexpr):
    """Lanes DISTANCE apart become a + b and a - b."""
    sign = tl.broadcast_to(tl.where((lane & DISTANCE) != 0, -1.0, 1.0), x[0].shape)
    out = ()
    for c in tl.static_range(COUNT):
        # exact, as the product is
        out = out + (tl.fma(x[c], sign, swap_lanes(x[c], lane, DISTANCE)),)
    return out


@triton.jit
def _outer(x, COUNT: tl.constexpr, OUTER: tl.constexpr):
    """Blocks of COUNT / len(OUTER) columns times the matrix of signs, sums from left to right."""
    out = ()
    for i in tl.static_range(len(OUTER)):
        for k in tl.static_range(COUNT // len(OUTER)):
            if OUTER[i] & 1:
                total = x[k] * -1.0
            else:
                total = x[k]
            for j in tl.static_range(1, len(OUTER)):
                if (OUTER[i] >> j) & 1:
                    total = total - x[j * (COUNT // len(OUTER)) + k]
                else:
                    total = total + x[j * (COUNT // len(OUTER)) + k]
            out = out + (total,)
    return out


@triton.jit
def hadamard(
    x, lane, COUNT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, SIGNS: tl.constexpr, OUTER: tl.constexpr
):
    """rotation.hadamard_transform of a tile of fp32 vectors.

    Args:    x: COUNT = head_size / LANES columns; lane: 0 .. LANES - 1 as [1, LANES]; SIGNS from signs_mask, OUTER from
             outer_masks: if it has more than one row, LANES is 1
    Returns: COUNT columns
    """
    x = _change_signs(x, lane, SIGNS, COUNT, LANES, GROUP)
    for stage in tl.static_range(8):
        if (1 << stage) < COUNT * LANES // len(OUTER):
            if (1 << stage) < GROUP:
                x = _butterflies(x, COUNT, 1 << stage)
            elif (1 << stage) < GROUP * LANES:
                x = _lane_butterflies(x, lane, COUNT, (1 << stage) // GROUP)
            else:
                x = _butterflies(x, COUNT, (1 << stage) // LANES)
    if len(OUTER) > 1:
        x = _outer(x, COUNT, OUTER)
    return x


@triton.jit
def _fold(x, HALF: tl.constexpr):
    out = ()
    for c in tl.static_range(HALF):
        out = out + (x[c] + x[c + HALF],)
    return out


@triton.jit
def tree_sum(x, lane, COUNT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """reference.tree_sum over the coordinates of COUNT columns, the same in every lane: [TOKENS, LANES]."""
    if LANES == 1:
        for level in tl.static_range(8):
            if COUNT % (2 << level) == 0:
                x = _fold(x, COUNT >> (level + 1))
        total = x[0]
        for c in tl.static_range(1, COUNT // (COUNT & -COUNT)):
            total = total + x[c]
        return total
    else:
        # the coordinate's bits from the top: column groups, lanes, columns of a group
        for level in tl.static_range(8):
            if (COUNT >> level) > GROUP:
                x = _fold(x, COUNT >> (level + 1))
        for level in tl.static_range(8):
            if (LANES >> (level + 1)) > 0:
                sums = ()
                for c in tl.static_range(GROUP):
                    sums = sums + (x[c] + swap_lanes(x[c], lane, LANES >> (level + 1)),)
                x = sums
        for level in tl.static_range(4):
            if (GROUP >> (level + 1)) > 0:
                x = _fold(x, GROUP >> (level + 1))
        return x[0]
