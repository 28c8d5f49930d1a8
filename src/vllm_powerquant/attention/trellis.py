"""A tail-biting trellis for 2-bit values: the symbol before decides between two sets of four even levels.

Up to sixteen neighbouring rotated channels form a ring. With s the symbol of a channel (idx, 0 to 3) and p that of the
channel before it in its ring (before the first: the last), the channel's level is

    k = s ^ (p >> 1)        n + 1/2 = 5 (k - 3/2) if p is even, else -3 (k - 3/2)

so symbols choose not only levels but which levels come next: -7.5, -2.5, 2.5, 7.5 or 4.5, 1.5, -1.5, -4.5. Of Gaussian
vectors a fifth less of the energy is lost than with four even levels (bench_quality.py --distortion). Kernels decode whole
words of symbols by a few logical instructions, since n + 8 = k + 4 (k ^ 3 (p & 1)). Why this map of (s, p) to levels:
benchmarks/QUALITY_LOG.md.

Encoding finds the symbols of least squared error: Viterbi's algorithm from each of the four symbols that a ring may end
with. Coordinates are rounded to eighths of a level's distance first and cut off at 16 distances; sums of integers make
every implementation find the same symbols.

Source: M. W. Marcellin and T. R. Fischer, "Trellis coded quantization", IEEE Trans. Commun. 38 (1990); overlapping windows
of bits and rings without side information: A. Tseng et al., "QTIP", arXiv:2406.11235.
"""

from __future__ import annotations

import torch

UNIT = 8  # parts of a level's distance that coordinates are rounded to
FAR = 1 << 26  # more than any sum of errors
LIMIT = 16.0  # of coordinates, in levels' distances


def ring_length(head_size: int) -> int:
    """Channels of a ring: the largest divisor of head_size / 4 up to 16, so that a ring lies in one field of the bytes."""
    quarter = head_size // 4
    return max(n for n in range(1, 17) if quarter % n == 0)


def level_of(symbol: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """n of symbols [...] and of those before them, both 0 to 3."""
    a = symbol ^ (before >> 1)
    return a + 4 * (a ^ (3 * (before & 1))) - 8


def levels(idx: torch.Tensor) -> torch.Tensor:
    """idx [..., head_size] uint8 -> n [..., head_size] int64, -8 to 7."""
    rings = idx.long().unflatten(-1, (-1, ring_length(idx.shape[-1])))
    return level_of(rings, rings.roll(1, -1)).flatten(-2)


def encode(t: torch.Tensor) -> torch.Tensor:
    """Symbols whose levels are nearest to t; of equally good ones the first in the order below.

    Args:    t [..., head_size] fp32, in levels' distances; cut off at -LIMIT, where NaN goes too, and at LIMIT
    Returns: idx [..., head_size] uint8
    """
    n = ring_length(t.shape[-1])
    low = torch.full_like(t, -LIMIT)
    x = torch.where(t > -LIMIT, t, low).clamp(max=LIMIT)
    x = torch.round(x * UNIT).to(torch.int32).unflatten(-1, (-1, n)).movedim(-1, 0).contiguous()
    # Least sums of errors (less x^2) up to a channel, by its symbol, [4 starts, ...] each: a start is the symbol that a ring
    # is to end with. Sums are times 4, with the symbol before in the last two bits: the first of equal sums is the least.
    start = torch.arange(4, dtype=torch.int32, device=t.device).view(4, *(1,) * (x.dim() - 1))
    least = [torch.where(start == symbol, symbol, FAR + symbol).expand(4, *x.shape[1:]) for symbol in range(4)]
    choices = []
    for i in range(n):
        error = {level: 4 * level * (level - 2 * x[i]) for level in {_level(s, p) for s in range(4) for p in range(4)}}
        sums = []
        for symbol in range(4):
            best = least[0] + error[_level(symbol, 0)]
            for before in range(1, 4):
                best = torch.minimum(best, least[before] + error[_level(symbol, before)])
            sums.append(best)
        choices.append(torch.stack(sums) & 3)  # [4 symbols, 4 starts, ...]
        least = [(best & -4) + symbol for symbol, best in enumerate(sums)]
    ends = torch.stack([least[symbol][symbol] for symbol in range(4)])
    now = (ends.min(0).values & 3).long()
    of_start = now[None, None].expand(4, 1, *now.shape)
    idx = []
    for before in reversed(choices):
        idx.append(now)
        now = before.gather(1, of_start)[:, 0].gather(0, now[None])[0].long()
    return torch.stack(idx[::-1], -1).flatten(-2).to(torch.uint8)


def _level(symbol: int, before: int) -> int:
    """n + 1/2 in units."""
    k = symbol ^ (before >> 1)
    return UNIT // 2 * (2 * (k + 4 * (k ^ 3 * (before & 1))) - 15)
