"""Examples of the K4/V2 cache format that this package and the C++ engine must both reproduce, byte for byte.

    python tests/sparse/packed_vectors.py       writes third_party/PowerInfer/tests/data/packed_kv_k4v2.txt

Lines of the file: `head_size D` starts a sub-page of bytes 0xA5; `token T KIND` a token in it; `key` and `value` its fp32
bits, 8 hexadecimal digits a number; `slot` the bytes that it is stored as, in the order of PageLayout.slot_offsets; `page`
the FNV-1a hash (64 bits) of the sub-page with all its tokens.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat

DATA_FILE = Path(__file__).parents[2] / "third_party/PowerInfer/tests/data/packed_kv_k4v2.txt"
HEAD_SIZES = (64, 80, 128, 256)


def tokens(head_size: int) -> list[tuple[int, str, torch.Tensor]]:
    """(token, kind, key and value [2, head_size] fp32) of one sub-page."""
    # not torch's generator: it may change
    rng = np.random.Generator(np.random.PCG64(head_size))
    normal = rng.integers(-(2**20), 2**20, (3, 2, head_size)).astype(np.float32) / np.float32(2**19)
    # a few coordinates hold most of the length
    normal[1, :, ::17] *= 37.0
    out = [(0, "plain", normal[0]), (37, "outliers", normal[1])]
    if head_size == HEAD_SIZES[0]:
        special = {"zero": 0.0, "tiny": 1e-30, "subnormal": 1e-41, "huge": 1e38, "nan": math.nan, "infinite": math.inf}
        for token, (kind, number) in enumerate(special.items(), 58):
            x = normal[2].copy()
            if math.isfinite(number):
                x = x * np.float32(number)
            else:
                x[0, 5] = x[1, 63] = number
            out.append((token, kind, x))
    return [(token, kind, torch.from_numpy(x)) for token, kind, x in out]


def page(cache_format: CacheFormat, contents: list[tuple[int, str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots [tokens, slot_bytes] and the sub-page [sub_page_bytes] that the reference stores them in."""
    layout = cache_format.layout
    slots = reference.encode(
        cache_format, torch.stack([x[:1] for _, _, x in contents]), torch.stack([x[1:] for _, _, x in contents])
    )[:, 0]
    sub_page = torch.full((layout.sub_page_bytes,), 0xA5, dtype=torch.uint8)
    for (token, _, _), slot in zip(contents, slots, strict=True):
        sub_page[layout.slot_offsets[token]] = slot
    return slots, sub_page


def fnv1a(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def text() -> str:
    """The whole file."""
    lines = ["# written by: python tests/sparse/packed_vectors.py"]
    for head_size in HEAD_SIZES:
        contents = tokens(head_size)
        slots, sub_page = page(CacheFormat(head_size), contents)
        lines.append(f"head_size {head_size}")
        for (token, kind, vectors), slot in zip(contents, slots, strict=True):
            lines.append(f"token {token} {kind}")
            for name, vector in zip(("key", "value"), vectors.numpy(), strict=True):
                lines.append(f"{name} " + "".join(f"{bits:08x}" for bits in vector.view(np.uint32).tolist()))
            lines.append("slot " + slot.numpy().tobytes().hex())
        lines.append("page " + fnv1a(sub_page.numpy().tobytes()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DATA_FILE.write_text(text(), encoding="ascii")
