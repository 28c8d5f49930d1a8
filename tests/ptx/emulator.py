"""Runs Triton and Gluon kernels, compiled to PTX for Hopper GPUs (sm_90), on CPU tensors.

EmulatedKernel takes the place of a JIT function: it specialises and compiles as Triton does, splits the PTX into basic
blocks and runs them in numpy for many warps at once: always the lowest block at which a warp stands, for all warps standing
there, so warps part at branches and meet again. bar.sync holds a warp until all warps of its program have come.

Modelled: registers by their bits, predication, global and shared memory, cp.async groups, barriers, shuffles, ldmatrix and
stmatrix, mma of bytes, fp16 and bf16. Errors are raised for races, bounds, alignment and more, as memory.py says.

Not modelled: time; the order of memory between programs (a launch ends before the next begins, so a missing gdc_wait is not
seen); branches that diverge within a warp (refused); the errors of approximate instructions (ex2, lg2, div.full are exact
here) and of sums within one mma of 16-bit numbers (double precision here); wgmma, TMA, clusters, atomics.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from collections.abc import Callable

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import create_function_from_signature

from ptx.instructions import BITS, LANES, UNSIGNED, UnsupportedInstruction, arithmetic, full, operand_bits, unpack
from ptx.memory import EmulationError, GlobalMemory, SharedMemory

TARGET = GPUTarget("cuda", 90, 32)
WARPS_AT_ONCE = 256
# without effect here, or only on the order of memory between programs
IGNORED = ("membar", "fence", "griddepcontrol", "nanosleep")


@dataclasses.dataclass
class Device:
    """What the emulated GPU is like: its size, and whether the last of the copies that a thread waits for lands first."""

    multiprocessors: int = 1
    reverse_copies: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    op: list[str]  # opcode and modifiers
    operands: list[list[str]]  # a vector operand has several registers
    guard: str | None  # predicate register
    negated: bool
    text: str


def parse(ptx: str) -> tuple[list[str], dict[str, int], list[Instruction], dict[str, int]]:
    """A kernel's parameters, bits by register name (without number), instructions, and labels as positions in them."""
    entry = ptx[ptx.index(".visible .entry") :]
    parameters = re.findall(r"\.param\s[^,\n]*?(\w+_param_\d+)", entry[: entry.index("{")])
    body = re.sub(r"//.*", "", entry[entry.index("{") + 1 :])
    body = re.split(r"(?m)^\s*\.(?:file|section)", body)[0]
    body = re.sub(r"(?m)^\s*\.(loc|pragma).*$", "", body)
    # what braces are left are scopes
    body = re.sub(r"\{([^{};]*)\}", r"<\1>", body)
    bits, instructions, labels = {}, [], {}
    for statement in re.split(r";|\{|\}|(?<=:)\s*\n|\n(?=\$L)", body):
        text = " ".join(statement.split())
        while label := re.match(r"(\$\w+):\s*", text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :]
        if declaration := re.match(r"\.reg \.(\w+) (.*)", text):
            names = re.split(r",\s*", re.sub(r"<\d+>", "", declaration[2]))
            bits |= dict.fromkeys(names, 1 if declaration[1] == "pred" else BITS[declaration[1]])
        if not text or text.startswith("."):
            continue
        guard = re.match(r"@(!?)(%?\w+)\s+", text)
        op, _, operands = text[guard.end() if guard else 0 :].partition(" ")
        split = re.split(r",(?![^<]*>)(?![^\[]*\])", operands) if operands else []
        vectors = [[x.strip() for x in operand.strip(" <>").split(",")] for operand in split]
        negated = guard is not None and guard[1] == "!"
        instructions.append(Instruction(op.split("."), vectors, guard and guard[2], negated, text))
    return parameters, bits, instructions, labels


class Registers(dict):
    """Registers of the warps that run a block, by name, and constants, by (text, bits): arrays as in instructions.py."""

    def __init__(self, launch: Launch, warps: np.ndarray) -> None:
        self.launch, self.warps, self.count = launch, warps, len(warps)

    def __missing__(self, name: str | tuple[str, int]) -> np.ndarray:
        value = self[name] = self._constant(*name) if isinstance(name, tuple) else self._register(name)
        return value

    @staticmethod
    def _constant(text: str, bits: int) -> np.ndarray:
        value = int(text[2:], 16) if text.startswith("0f") else 0 if text == "global_smem" else int(text.rstrip("U"), 0)
        return np.full((1, 1), value != 0 if bits == 1 else value % 2**bits, UNSIGNED[bits])

    def _register(self, name: str) -> np.ndarray:
        launch = self.launch
        if name == "%tid.x":
            return ((self.warps % launch.program.warps)[:, None] * 32 + LANES).astype(np.uint32)
        if name == "%lanemask_lt":
            return np.broadcast_to((2**LANES - 1).astype(np.uint32), (self.count, 32))
        if name.startswith("%ctaid"):
            x, y, _ = launch.grid
            index = (self.warps + launch.first_warp) // launch.program.warps
            axis = {"x": index % x, "y": index // x % y, "z": index // (x * y)}[name[-1]]
            return np.repeat(axis[:, None], 32, 1).astype(np.uint32)
        if name not in launch.registers:  # a guarded instruction sets it
            launch.registers[name] = np.zeros((launch.count, 32), UNSIGNED[launch.program.bits_of(name)])
        value = launch.registers[name]
        return value if self.count == launch.count else value[self.warps]

    def full(self, name: str | tuple[str, int]) -> np.ndarray:
        return full(self[name], self.count)

    def chosen(self, guard: str | None, negated: bool) -> np.ndarray:
        """Which lanes execute an instruction: [warps, 32]."""
        if guard is None:
            return np.ones((self.count, 32), bool)
        return ~self.full(guard) if negated else self.full(guard)

    def threads(self, chosen: np.ndarray) -> np.ndarray:
        return (self.warps[:, None] * 32 + LANES)[chosen]

    def set(self, name: str, value: np.ndarray, chosen: np.ndarray | None) -> None:
        self[name] = value if chosen is None else np.where(chosen, value, self[name])

    def save(self, names: list[str]) -> None:
        """Keeps what other blocks read."""
        registers = self.launch.registers
        for name in names:
            value = self.full(name)
            if self.count < self.launch.count:
                # a copy: several names may share an array
                kept = registers[name].copy() if name in registers else np.zeros((self.launch.count, 32), value.dtype)
                kept[self.warps] = value
                value = kept
            registers[name] = value


Step = Callable[[Registers], None]


@dataclasses.dataclass
class Block:
    """Instructions without a branch, then a jump to block `target`, of the warps that `branch` is true for if it is one."""

    target: int
    steps: list[tuple[Step, str]] = dataclasses.field(default_factory=list)
    written: set[str] = dataclasses.field(default_factory=set)  # registers, if other blocks read them
    branch: Instruction | None = None
    barrier: bool = False


class Program:
    """A kernel's blocks, made ready to run. arguments: names of its run-time arguments."""

    def __init__(self, ptx: str, shared_bytes: int, warps: int, arguments: list[str]) -> None:
        self.parameters, self.bits, instructions, labels = parse(ptx)
        self.shared_bytes, self.warps, self.arguments = shared_bytes, warps, arguments
        bytewise = any("shared" in i.op and i.op[0] in ("ld", "st") and BITS[i.op[-1]] == 8 for i in instructions)
        self.granule = 1 if bytewise else 2
        ends = {i + 1 for i, instruction in enumerate(instructions) if self._ends_block(instruction)}
        starts = sorted({0, *labels.values(), *ends} - {len(instructions)})
        block_at = {start: k for k, start in enumerate(starts)} | {len(instructions): len(starts)}
        self.blocks, read = [], set()
        for start, stop in zip(starts, [*starts[1:], len(instructions)], strict=True):
            block = Block(block_at[stop])
            for i in instructions[start:stop]:
                if self._ends_block(i):
                    block.barrier = i.op[0] == "bar"
                    if i.op[0] == "bra":
                        block.target = block_at[labels[i.operands[0][0]]]
                    elif not block.barrier:
                        block.target = len(starts)
                    block.branch = i if i.guard else None
                    read |= {i.guard} - block.written
                elif i.op[0] not in IGNORED:
                    step, sources, to = self._step(i)
                    block.steps.append((step, i.text))
                    # where it is guarded, lanes keep what was there
                    read |= {*sources, *(to if i.guard else ()), i.guard} - block.written
                    block.written |= set(to)
            self.blocks.append(block)
        for block in self.blocks:
            block.written &= read

    def bits_of(self, register: str) -> int:
        return self.bits[register if register in self.bits else register.rstrip("0123456789")]

    def _ends_block(self, i: Instruction) -> bool:
        return i.op[0] in ("bra", "ret", "exit") or (i.op[:2] == ["bar", "sync"] and self.warps > 1)

    def _source(self, name: str, bits: int = 32) -> str | tuple[str, int]:
        register = (
            name.startswith(("%tid", "%ctaid", "%lanemask")) or name in self.bits or name.rstrip("0123456789") in self.bits
        )
        return name if register else (name, bits)

    def _address(self, operand: list[str], bits: int) -> tuple[str | tuple[str, int], int]:
        """Register and constant offset of a memory operand."""
        base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand[0]).groups()
        return self._source(base, bits), int(offset or "0", 0)

    def _step(self, i: Instruction) -> tuple[Step, list, list[str]]:
        """What executes an instruction, its sources and its destinations."""
        name = i.op[0]
        if name in ("bar", "cp"):
            return self._synchronisation(i) if name == "bar" or "shared" not in i.op else self._copy(i)
        if name in ("ld", "st"):
            return self._parameter(i) if "param" in i.op else self._access(i)
        if name in ("ldmatrix", "stmatrix"):
            return self._matrices(i)
        return self._arithmetic(i)

    def _arithmetic(self, i: Instruction) -> tuple[Step, list, list[str]]:
        to, operands = i.operands[0], i.operands[1:]
        if i.op[0] == "mov" and max(len(to), len(operands[0])) > 1:
            bits = BITS[i.op[-1]]
            sources = [self._source(x, bits // len(operands[0])) for x in operands[0]]
        else:
            sources = [self._source(x, operand_bits(i.op, k)) for k, operand in enumerate(operands) for x in operand]
        function = unpack(i.op, len(to)) if i.op[0] == "mov" and len(to) > 1 else arithmetic(i.op)

        def step(registers: Registers) -> None:
            result = function(*[registers[x] for x in sources])
            chosen = registers.chosen(i.guard, i.negated) if i.guard else None
            for register, value in zip(to, result if len(to) > 1 else (result,), strict=True):
                registers.set(register, value, chosen)

        return step, sources, [x for x in to if x != "_"]

    def _parameter(self, i: Instruction) -> tuple[Step, list, list[str]]:
        to, kind = i.operands[0][0], UNSIGNED[BITS[i.op[-1]]]
        parameter, _ = self._address(i.operands[1], 64)
        index = self.parameters.index(parameter[0])

        def step(registers: Registers) -> None:
            value = registers.launch.arguments[index] % 2 ** (8 * np.dtype(kind).itemsize)
            registers[to] = np.full((1, 1), value, kind)

        return step, [], [to]

    def _access(self, i: Instruction) -> tuple[Step, list, list[str]]:
        bits, shared, load = BITS[i.op[-1]], any(x.startswith("shared") for x in i.op), i.op[0] == "ld"
        if not (shared or "global" in i.op):
            raise UnsupportedInstruction(i.text)
        base, offset = self._address(i.operands[1 if load else 0], 32 if shared else 64)
        values = [self._source(x, bits) for x in i.operands[0 if load else 1]]
        size = bits // 8 * len(values)

        def step(registers: Registers) -> None:
            launch, chosen = registers.launch, registers.chosen(i.guard, i.negated)
            thread = registers.threads(chosen)
            if not len(thread):
                if load:
                    for register in values:
                        registers.set(register, registers[register], None)
                return
            address = _addresses(registers, base, offset, shared)[chosen]
            if load:
                if shared:
                    data = launch.shared.load(address, size, thread)
                else:
                    data = launch.memory.load(address, size, (thread >> 5) + launch.first_warp)
                data = data.view(UNSIGNED[bits])
                for k, register in enumerate(values):
                    value = np.zeros((registers.count, 32), UNSIGNED[self.bits_of(register)])
                    value[chosen] = data[:, k]
                    registers.set(register, value, chosen if i.guard else None)
            else:
                parts = [registers.full(x)[chosen].astype(UNSIGNED[bits]) for x in values]
                data = np.stack(parts, 1).view(np.uint8)
                if shared:
                    launch.shared.store(address, data, thread)
                else:
                    launch.memory.store(address, data, (thread >> 5) + launch.first_warp)

        return (step, [base], values) if load else (step, [base, *values], [])

    def _copy(self, i: Instruction) -> tuple[Step, list, list[str]]:
        (to, to_offset), (source, source_offset) = self._address(i.operands[0], 32), self._address(i.operands[1], 64)
        size = int(i.operands[2][0], 0)
        filled = self._source(i.operands[3][0]) if len(i.operands) > 3 else (str(size), 32)

        def step(registers: Registers) -> None:
            launch, chosen = registers.launch, registers.chosen(i.guard, i.negated)
            thread = registers.threads(chosen)
            if not len(thread):
                return
            count = registers.full(filled)[chosen]
            if ((count != 0) & (count != size)).any():
                raise UnsupportedInstruction(i.text)
            # the rest of a copy is filled with zeros
            data, real = np.zeros((len(thread), size), np.uint8), count > 0
            address = _addresses(registers, source, source_offset, False)[chosen]
            if real.any():
                data[real] = launch.memory.load(address[real], size, (thread[real] >> 5) + launch.first_warp)
            launch.shared.copy(_addresses(registers, to, to_offset, True)[chosen], data, thread)

        return step, [to, source, filled], []

    def _synchronisation(self, i: Instruction) -> tuple[Step, list, list[str]]:
        if i.guard:
            raise UnsupportedInstruction(i.text)
        kind, name = i.op[0], i.op[1] if i.op[0] == "bar" else i.op[2]
        if (kind, name) == ("bar", "warp"):
            return lambda registers: registers.launch.shared.warp_barrier(registers.warps), [], []
        if (kind, name) == ("bar", "sync"):  # of the only warp
            return lambda registers: registers.launch.shared.program_barrier(registers.warps), [], []
        if name == "commit_group":
            return lambda registers: registers.launch.shared.commit_group(registers.warps), [], []
        if name == "wait_group":
            pending = int(i.operands[0][0])
            return lambda registers: registers.launch.shared.wait_group(registers.warps, pending), [], []
        raise UnsupportedInstruction(i.text)

    def _matrices(self, i: Instruction) -> tuple[Step, list, list[str]]:
        """Lane 8 k + r has the address of row r of matrix k; lane l holds two elements of it, in row l / 4."""
        load, transposed = i.op[0] == "ldmatrix", "trans" in i.op
        if i.guard or i.op[-1] != "b16":
            raise UnsupportedInstruction(i.text)
        base, offset = self._address(i.operands[1 if load else 0], 32)
        values = i.operands[0 if load else 1]
        count = len(values)

        def step(registers: Registers) -> None:
            shared = registers.launch.shared
            chosen = full(LANES < 8 * count, registers.count)
            address, thread = _addresses(registers, base, offset, True)[chosen], registers.threads(chosen)
            if load:
                rows = shared.load(address, 16, thread, by_warp=True)
                rows = rows.view(np.uint16).reshape(registers.count, count, 8, 8)
                rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)
                for k, register in enumerate(values):
                    registers[register] = np.ascontiguousarray(
                        rows.view(np.uint32).reshape(registers.count, count, 32)[:, k]
                    )
            else:
                rows = np.stack([registers.full(x) for x in values], 1).view(np.uint16).reshape(registers.count, count, 8, 8)
                rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)
                shared.store(address, rows.view(np.uint8).reshape(-1, 16), thread, by_warp=True)

        return (step, [base], values) if load else (step, [base, *values], [])


def _addresses(registers: Registers, base: str | tuple[str, int], offset: int, shared: bool) -> np.ndarray:
    address = registers.full(base)
    if shared:
        return address.astype(np.int64) + offset
    return address + np.uint64(offset % 2**64)


class Launch:
    """State of the programs from first_warp on, as many as run at once."""

    def __init__(
        self, program: Program, arguments: list[int], memory: GlobalMemory, grid, first_warp: int, count: int, device
    ):
        self.program, self.arguments, self.memory, self.grid = program, arguments, memory, grid
        self.first_warp, self.count = first_warp, count
        programs = count // program.warps
        self.shared = SharedMemory(program.shared_bytes, programs, program.warps, program.granule, device.reverse_copies)
        self.registers: dict[str, np.ndarray] = {}

    @np.errstate(all="ignore")
    def run(self) -> None:
        blocks = self.program.blocks
        at = np.zeros(self.count, np.int64)
        waiting = np.zeros(self.count, bool)
        while (at < len(blocks)).any():
            runnable = np.where(waiting, len(blocks), at)
            lowest = int(runnable.min())
            if lowest == len(blocks):
                raise EmulationError("some warps of a program wait at a barrier, others have ended")
            warps = np.flatnonzero(runnable == lowest)
            block, registers = blocks[lowest], Registers(self, warps)
            for step, text in block.steps:
                try:
                    step(registers)
                except EmulationError as error:
                    raise EmulationError(f"{error}: {text}") from None
            registers.save(block.written)
            at[warps] = block.target
            if block.branch:
                taken = registers.chosen(block.branch.guard, block.branch.negated)
                if (taken.any(1) != taken.all(1)).any():
                    raise EmulationError(f"branch diverges within a warp: {block.branch.text}")
                at[warps] = np.where(taken[:, 0], block.target, lowest + 1)
            if block.barrier:
                waiting[warps] = True
                self._release(at, waiting)

    def _release(self, at: np.ndarray, waiting: np.ndarray) -> None:
        """Lets programs go on all of whose warps wait."""
        complete = np.repeat(waiting.reshape(-1, self.program.warps).all(1), self.program.warps)
        places = at[complete].reshape(-1, self.program.warps)
        if (places != places[:, :1]).any():
            raise EmulationError("warps of a program wait at different barriers")
        self.shared.program_barrier(np.flatnonzero(complete))
        waiting[complete] = False


class EmulatedKernel:
    """Stands in for a JIT function: kernel[grid](...) emulates the launch. poison: outputs filled with NaN before it."""

    def __init__(self, function, device: Device, poison: tuple[str, ...] = ()) -> None:
        self.function, self.device, self.poison = function, device, poison

    def __getattr__(self, name: str):
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args, **kwargs) -> None:
        program, bound = _compiled(self.function, args, kwargs)
        for name in self.poison:
            bound[name].fill_(torch.nan)
        tensors = {name: x for name, x in bound.items() if isinstance(x, torch.Tensor)}
        memory = GlobalMemory(tensors)
        # two more than the kernel's own: scratch memory, which it may not use
        arguments = [_bits(bound[name]) for name in program.arguments] + [0, 0]
        grid = (*grid, 1, 1)[:3]
        total = grid[0] * grid[1] * grid[2]
        at_once = max(1, WARPS_AT_ONCE // program.warps)
        for first in range(0, total, at_once):
            count = min(at_once, total - first) * program.warps
            Launch(program, arguments, memory, grid, first * program.warps, count, self.device).run()


def _bits(argument: torch.Tensor | float | int) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return struct.unpack("<I", struct.pack("<f", argument))[0] if isinstance(argument, float) else int(argument)


_programs: dict[tuple, Program] = {}


def _compiled(function, args, kwargs) -> tuple[Program, dict]:
    """The program of a launch, by Triton's own specialisation of its arguments, and the arguments by name."""
    backend = make_backend(TARGET)
    kwargs = kwargs | {"debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    key = (function.cache_key, str(specialization), str(options))
    if key not in _programs:
        options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
        source = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
        compiled = triton.compile(
            source(function, signature, constants, attributes), target=TARGET, options=options.__dict__
        )
        arguments = [name for name, kind in signature.items() if kind != "constexpr"]
        metadata = compiled.metadata
        _programs[key] = Program(compiled.asm["ptx"], metadata.shared, metadata.num_warps, arguments)
    return _programs[key], bound
