"""The inline PTX of the Hopper kernel on packed bytes, instruction by instruction: the levels that the layout says."""

import re

import pytest
import torch

from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels.unpack_hopper import (
    first_table,
    key_asm,
    key_channel_order,
    key_parts,
    value_asm,
)

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selectors: int) -> int:
    table, out = a | b << 32, 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = table >> 8 * (selector & 7) & 255
        # the selector's top bit asks for the byte's sign, replicated
        out |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * i
    return out


def run_ptx(code: str, num_outputs: int, *inputs: int) -> list[int]:
    """Registers $0 .. after the instructions; inputs are the registers behind them."""
    registers = {f"${num_outputs + i}": value & MASK for i, value in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0) & MASK

    for line in code.strip("{} ").split(";"):
        words = re.split(r"[\s,]+", line.strip(), maxsplit=1)
        if words[0] in ("", ".reg"):
            continue
        to, *operands = re.split(r",\s*", words[1])
        a, b, c, *_ = [value(x) for x in operands] + [0, 0, 0]
        name = words[0].split(".")[0]
        if name == "lop3":
            assert operands[3] == "0xEA"
        registers[to] = {
            "mov": lambda a, b, c: a,
            "not": lambda a, b, c: a ^ MASK,
            "and": lambda a, b, c: a & b,
            "xor": lambda a, b, c: a ^ b,
            "sub": lambda a, b, c: (a - b) & MASK,
            "shl": lambda a, b, c: a << b & MASK,
            "shr": lambda a, b, c: a >> b,
            "prmt": prmt,
            "lop3": lambda a, b, c: a & b | c,
        }[name](a, b, c)
    return [registers[f"${i}"] for i in range(num_outputs)]


def words_of(data: torch.Tensor) -> list[int]:
    return [int.from_bytes(bytes(data[i : i + 4].tolist()), "little") for i in range(0, len(data), 4)]


def signed_bytes(words: list[int]) -> list[int]:
    return [(word >> 8 * i & 255 ^ 128) - 128 for word in words for i in range(4)]


def packed(fmt: CacheFormat, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes: key_idx, value_idx [tokens, head_size] and slots [tokens, slot_bytes]."""
    g = torch.Generator().manual_seed(fmt.key_bits * 10 + fmt.value_bits)
    key_idx = torch.randint(0, 2**fmt.key_bits, (tokens, fmt.head_size), generator=g).to(torch.uint8)
    value_idx = torch.randint(0, 2**fmt.value_bits, (tokens, fmt.head_size), generator=g).to(torch.uint8)
    scale = torch.ones(tokens, dtype=torch.float16)
    return key_idx, value_idx, fmt.layout.pack_slots(key_idx, scale, value_idx, scale)


@pytest.mark.parametrize("head_size, bits", [(64, 2), (64, 4), (128, 2), (128, 3), (128, 4), (256, 2), (256, 3), (256, 4)])
def test_keys(head_size, bits):
    fmt = CacheFormat(head_size, bits, 2)
    key_idx, _, slots = packed(fmt, 3)
    code, order = key_asm(fmt.key_codebook), key_channel_order(head_size, bits)
    assert sorted(order) == list(range(head_size))
    levels, table = torch.tensor(fmt.key_codebook.levels), first_table(fmt.key_codebook)
    for token in range(3):
        low = words_of(slots[token, : head_size * min(bits, 4) // 8 if bits != 3 else head_size // 4])
        if bits == 3:
            high = words_of(slots[token, head_size // 4 : head_size * 3 // 8])
            half = len(low) // 2
            pieces = [
                [run_ptx(code[odd], 4, w, h, table) for w, h in zip(low[odd * half :][:half], high, strict=True)]
                for odd in (0, 1)
            ]
        else:
            step = len(low) // key_parts(head_size, bits)
            parts = [low[start : start + step] for start in range(0, len(low), step)]
            pieces = [[run_ptx(code[0], {2: 4, 4: 2}[bits], w, table) for w in part] for part in parts]
        got = [byte for piece in pieces for output in zip(*piece, strict=True) for byte in signed_bytes(list(output))]
        assert got == levels[key_idx[token].long()][order].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values(bits):
    """Four tokens at consecutive positions of one column after the other; 2-bit codes keep their field's weight, and the
    last of them comes with the others."""
    d = 128
    fmt = CacheFormat(d, 4, bits)
    _, value_idx, slots = packed(fmt, 4)
    code, levels = value_asm(fmt.value_codebook), torch.tensor(fmt.value_codebook.levels)
    table = first_table(fmt.value_codebook)
    start = d // 2
    columns = slots[:, start : start + d * bits // 8].T.contiguous()
    want = levels[value_idx.long()].T.tolist()  # [channel][token]
    if bits == 2:
        for column in range(d // 4):
            fields = [signed_bytes([word]) for word in run_ptx(code[0], 4, *words_of(columns[column]))]
            fields[3] = [byte - sum(others) for byte, *others in zip(fields[3], *fields[:3], strict=True)]
            for field, data in enumerate(fields):
                offset = 2 if field < 3 else 0  # field 3 is the level itself, the others are idx
                got = [byte // 4**field - offset for byte in data]
                assert got == want[field * (d // 4) + column]
    elif bits == 4:
        for column in range(d // 2):
            for field, word in enumerate(run_ptx(code[0], 2, *words_of(columns[column]), table)):
                assert signed_bytes([word]) == want[field * (d // 2) + column]
    else:
        for column in range(d // 4):
            odd, high = divmod(column, d // 8)
            outputs = run_ptx(code[odd], 4, *words_of(columns[column]), *words_of(columns[d // 4 + high]), table)
            for field, word in enumerate(outputs):
                assert signed_bytes([word]) == want[field * (d // 4) + column]
