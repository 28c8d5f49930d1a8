"""Global and shared memory of emulated kernels, with the checks that the hardware does not make."""

from __future__ import annotations

import ctypes

import numpy as np
import torch


class EmulationError(Exception):
    """A kernel did what has no defined result on a GPU."""


def gather(buffer: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """Bytes [len(offsets), size] from offsets that are multiples of size."""
    unit = min(size, 8)
    whole = len(buffer) // unit * unit
    if unit == 1 or buffer.ctypes.data % unit or (len(offsets) and int(offsets.max()) + size > whole):
        return buffer[offsets[:, None] + np.arange(size)]
    words = buffer[:whole].view(f"u{unit}")
    return words[(offsets // unit)[:, None] + np.arange(size // unit)].view(np.uint8)


def _require_aligned(address: np.ndarray, size: int) -> None:
    if (address % np.asarray(size, address.dtype)).any():
        raise EmulationError(f"misaligned access of {size} bytes")


class GlobalMemory:
    """The storages of a launch's tensors at their own addresses.

    Raises EmulationError where an access is out of their bounds or misaligned, where different values are stored to one
    byte, and where a warp reads what another one has stored in the same launch.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        storages = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages.setdefault(storage.data_ptr(), (storage.nbytes(), name))
        self.regions = []
        for base, (size, name) in storages.items():
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            self.regions.append((base, data, name))
        # of each byte that was stored: the warp; made on a region's first store
        self.writer: dict[int, np.ndarray] = {}

    def _pieces(self, address: np.ndarray, size: int):
        """Splits accesses by region: (base, bytes, name, which accesses, their offsets)."""
        left = np.ones(len(address), bool)
        for base, data, name in self.regions:
            here = left & (address >= np.uint64(base)) & (address + np.uint64(size) <= np.uint64(base + len(data)))
            if here.any():
                left &= ~here
                yield base, data, name, here, (address[here] - np.uint64(base)).astype(np.int64)
        if left.any():
            bad = int(address[left][0])
            base, data, name = min(self.regions, key=lambda r: min(abs(bad - r[0]), abs(bad - r[0] - len(r[1]))))
            raise EmulationError(f"address out of bounds: byte {bad - base} of {name}, which has {len(data)}")

    def load(self, address: np.ndarray, size: int, warp: np.ndarray) -> np.ndarray:
        """Args: address [n] uint64; warp [n]: who reads. Returns: [n, size] uint8."""
        _require_aligned(address, size)
        out = np.empty((len(address), size), np.uint8)
        for base, data, name, here, offset in self._pieces(address, size):
            if base in self.writer:
                writer = self.writer[base][offset]
                if ((writer != -1) & (writer != warp[here])).any():
                    raise EmulationError(f"reads what another warp has stored to {name} in the same launch")
            out[here] = gather(data, offset, size)
        return out

    def store(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        """Args: address [n] uint64; values [n, size] uint8; warp [n]."""
        size = values.shape[1]
        _require_aligned(address, size)
        for base, data, name, here, offset in self._pieces(address, size):
            if base not in self.writer:
                self.writer[base] = np.full(len(data), -1, np.int32)
            at, new, who = offset[:, None] + np.arange(size), values[here], warp[here, None]
            writer = self.writer[base][at]
            if ((writer != -1) & (writer != who) & (data[at] != new)).any():
                raise EmulationError(f"two warps store different values to one byte of {name}")
            data[at] = new
            self.writer[base][at] = who
            if (data[at] != new).any():
                raise EmulationError(f"threads store different values to one byte of {name}")


_NOBODY, _SEVERAL = -1, -2


class _Accesses:
    """Who accessed each granule of shared memory last, and how many barriers (epochs) there were before."""

    def __init__(self, granules: int) -> None:
        self.thread = np.full(granules, _NOBODY, np.int32)
        self.warp = np.full(granules, _NOBODY, np.int32)
        self.warp_epoch = np.zeros(granules, np.int32)
        self.program_epoch = np.zeros(granules, np.int32)


class SharedMemory:
    """Shared memory of several programs; each starts as 0xFF bytes (NaN) and has an address range of its own.

    Data of cp.async land when the thread waits for them, oldest first, or newest first with reverse_copies (hardware
    promises no order). Raises EmulationError for bounds and alignment, and for accesses of different threads to one granule
    without a barrier between (bar.warp.sync within a warp, bar.sync among warps) one of which writes, a cp.async in flight
    included.
    """

    def __init__(self, size: int, programs: int, warps: int, granule: int, reverse_copies: bool) -> None:
        """Args: size: bytes of a program; warps: of a program; granule: bytes that races are looked for in"""
        self.size, self.warps, self.granule, self.reverse_copies = size, warps, granule, reverse_copies
        self.stride = -(-max(16, size) // 16) * 16
        self.data = np.full(self.stride * programs, 0xFF, np.uint8)
        granules = len(self.data) // granule
        self.writes, self.reads = _Accesses(granules), _Accesses(granules)
        self.copying = np.full(granules, _NOBODY, np.int32)
        self.warp_epoch = np.zeros(programs * warps, np.int32)
        self.program_epoch = np.zeros(programs * warps, np.int32)
        self.group = np.zeros(programs * warps, np.int32)
        # (address, bytes, thread, group) of copies in flight
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def warp_barrier(self, warps: np.ndarray) -> None:
        self.warp_epoch[warps] += 1

    def program_barrier(self, warps: np.ndarray) -> None:
        self.warp_epoch[warps] += 1
        self.program_epoch[warps] += 1

    def load(self, address: np.ndarray, size: int, thread: np.ndarray, by_warp: bool = False) -> np.ndarray:
        """Args: address, thread [n]; by_warp: every lane of the warp reads (ldmatrix). Returns: [n, size] uint8."""
        address = self._located(address, size, thread)
        at = self._granules(address, size)
        self._refuse(self.copying[at] != _NOBODY, "reads bytes of a cp.async in flight")
        self._refuse(self._unordered(self.writes, at, thread, by_warp), "reads what another thread wrote, without a barrier")
        others = self._unordered(self.reads, at, thread)
        self._record(self.reads, at, thread, by_warp, others)
        return gather(self.data, address, size)

    def store(self, address: np.ndarray, values: np.ndarray, thread: np.ndarray, by_warp: bool = False) -> None:
        """Args: address, thread [n]; values [n, size] uint8; by_warp: they come from every lane of the warp (stmatrix)."""
        size = values.shape[1]
        address = self._located(address, size, thread)
        at = self._granules(address, size)
        self._refuse(self.copying[at] != _NOBODY, "writes bytes of a cp.async in flight")
        self._refuse(
            self._unordered(self.writes, at, thread, by_warp), "writes what another thread wrote, without a barrier"
        )
        self._refuse(self._unordered(self.reads, at, thread, by_warp), "writes what another thread read, without a barrier")
        self._record(self.writes, at, thread, by_warp)
        to = address[:, None] + np.arange(size)
        self.data[to] = values
        self._refuse(self.data[to] != values, "threads store different values to one byte of shared memory")

    def copy(self, address: np.ndarray, values: np.ndarray, thread: np.ndarray) -> None:
        """Starts a cp.async of values [n, size] uint8, which were in global memory."""
        size = values.shape[1]
        address = self._located(address, size, thread)
        at = self._granules(address, size)
        self._refuse(self.copying[at] != _NOBODY, "two cp.async in flight to one byte")
        self._refuse(self._unordered(self.writes, at, thread), "cp.async to what another thread wrote, without a barrier")
        self._refuse(self._unordered(self.reads, at, thread), "cp.async to what another thread read, without a barrier")
        self.copying[at] = thread[:, None]
        self._refuse(self.copying[at] != thread[:, None], "two threads start a cp.async to one byte")
        self.copies.append((address, values, thread, self.group[thread >> 5]))

    def commit_group(self, warps: np.ndarray) -> None:
        self.group[warps] += 1

    def wait_group(self, warps: np.ndarray, pending: int) -> None:
        """Lands what the warps copied, except in their last `pending` groups."""
        waits = np.zeros(len(self.group), bool)
        waits[warps] = True
        landing, flying = [], []
        for copy in self.copies:
            warp = copy[2] >> 5
            done = waits[warp] & (copy[3] < self.group[warp] - pending)
            for part, which in ((landing, done), (flying, ~done)):
                if which.any():
                    part.append(tuple(x[which] for x in copy))
        self.copies = flying
        for address, values, thread, _ in reversed(landing) if self.reverse_copies else landing:
            at = self._granules(address, values.shape[1])
            self.copying[at] = _NOBODY
            self._record(self.writes, at, thread)
            self.data[address[:, None] + np.arange(values.shape[1])] = values

    def _located(self, address: np.ndarray, size: int, thread: np.ndarray) -> np.ndarray:
        """Offsets in data of a program's own addresses."""
        if len(address) and (address.min() < 0 or address.max() + size > self.size):
            raise EmulationError(f"shared address out of bounds: {address.min()} to {address.max() + size} of {self.size}")
        _require_aligned(address, size)
        return address + (thread >> 5) // self.warps * self.stride

    def _granules(self, address: np.ndarray, size: int) -> np.ndarray:
        return (address // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    @staticmethod
    def _refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise EmulationError(what)

    def _unordered(self, accesses: _Accesses, at: np.ndarray, thread: np.ndarray, by_warp: bool = False) -> np.ndarray:
        """Where the last access was another thread's and no barrier came since."""
        thread = thread[:, None]
        warp = thread >> 5
        last = accesses.thread[at]
        same_epoch = np.where(
            accesses.warp[at] == warp,
            accesses.warp_epoch[at] == self.warp_epoch[warp],
            accesses.program_epoch[at] == self.program_epoch[warp],
        )
        return (last != _NOBODY) & ((last != thread) | by_warp) & same_epoch

    def _record(self, accesses: _Accesses, at, thread, by_warp: bool = False, others: np.ndarray | None = None) -> None:
        """Notes an access; others: granules that other threads accessed since the last barrier too."""
        thread = thread[:, None]
        warp = thread >> 5
        who, which = np.broadcast_to(_SEVERAL if by_warp else thread, at.shape), np.broadcast_to(warp, at.shape)
        if others is not None:
            which = np.where(others & (accesses.warp[at] != warp), _SEVERAL, which)
            who = np.where(others, _SEVERAL, who)
        accesses.thread[at], accesses.warp[at] = who, which
        accesses.warp_epoch[at], accesses.program_epoch[at] = self.warp_epoch[warp], self.program_epoch[warp]
        # several threads in this one instruction
        clash = accesses.thread[at] != who
        if others is not None and clash.any():
            accesses.thread[at[clash]] = _SEVERAL
