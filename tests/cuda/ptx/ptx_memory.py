"""The device memory of an interpreted kernel, and the checker of every access to it.

The rules are CUDA's own: two accesses to a byte, at least one of them a write and not both atomic, are a race unless
they are by one thread, or a barrier of the block or of the warp lies between them. Shuffles order nothing, nor does
anything order the blocks of a launch. The verdict does not depend on the order in which the threads were run.
"""

import bisect
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ptx_module import PtxError

# A stamp tells who accessed a byte, and when: block, barriers of the block so far, of the warp since, atomic, thread.
_THREAD_BITS, _ATOMIC, _WARP_SHIFT, _EPOCH_SHIFT, _BLOCK_SHIFT = 10, 1 << 10, 11, 23, 39
_THREAD = (1 << _THREAD_BITS) - 1
_WARP = _THREAD & ~31 | -1 << _BLOCK_SHIFT  # the bits in which threads of different warps differ
_NEVER = -1


def stamps(block: int, epoch: int, warp_clock: np.ndarray, thread: np.ndarray) -> np.ndarray:
    if block >> 24 or epoch >> 16 or (warp_clock >> 12).any():
        raise PtxError("more blocks or barriers than the checker can count")
    return (block << _BLOCK_SHIFT) | (epoch << _EPOCH_SHIFT) | (warp_clock << _WARP_SHIFT) | thread


def _unordered(old: np.ndarray, now: np.ndarray, first_block: int) -> np.ndarray:
    """Whether `old` is an access of this launch that nothing orders before `now`."""
    same_block = (old >> _BLOCK_SHIFT) == (now >> _BLOCK_SHIFT)
    same_epoch = (old >> _EPOCH_SHIFT) == (now >> _EPOCH_SHIFT)
    same_thread = (old & _THREAD) == (now & _THREAD)
    same_warp = (old & _THREAD) >> 5 == (now & _THREAD) >> 5
    warp_ordered = same_warp & ((old >> _WARP_SHIFT) < (now >> _WARP_SHIFT))
    return (old >> _BLOCK_SHIFT >= first_block) & (~same_block | (same_epoch & ~same_thread & ~warp_ordered))


class Shadow:
    """Who last wrote each byte of a buffer, and two of those who read it since.

    Two readers are enough when they are of different warps: whatever is ordered after both is ordered after all.
    """

    def __init__(self, size: int, initialised: bool) -> None:
        self.initialised = np.full(size, initialised)
        self.writer = np.full(size, _NEVER, np.int64)
        self.readers = np.full((2, size), _NEVER, np.int64)

    def access(
        self, offset: np.ndarray, size: int, now: np.ndarray, first_block: int, write: bool, atomic: bool
    ) -> Iterator[tuple[str, str]]:
        """Records an access of `size` bytes at every offset by the threads stamped `now`; yields what is wrong."""
        at = (offset[:, None] + np.arange(size)).ravel()
        now = np.repeat(now, size)
        if atomic:
            now = now | _ATOMIC
        writer = self.writer[at]
        reads = not write or atomic
        if reads and not (written := self.initialised[at]).all():
            yield "uninitialised", f"byte {at[~written][0]} was never written"
        clash = _unordered(writer, now, first_block)
        if atomic:
            clash &= writer & _ATOMIC == 0
        if clash.any():
            yield "race", self._pair("write" if write else "read", "write", now, writer, clash)
        if write:
            for readers in self.readers:
                clash = _unordered(readers[at], now, first_block)
                if clash.any():
                    yield "race", self._pair("write", "read", now, readers[at], clash)
            self.writer[at] = now
            self.readers[:, at] = _NEVER
            self.initialised[at] = True
            if not atomic and (clash := self.writer[at] != now).any():
                yield "race", self._pair("write", "write", now, self.writer[at], clash)
        else:
            self._remember_readers(at, now, first_block)

    def _remember_readers(self, at: np.ndarray, now: np.ndarray, first_block: int) -> None:
        first, second = self.readers
        stale = ~_unordered(first[at], now, first_block)
        first[at[stale]] = now[stale]
        rest = first[at] != now
        if not rest.any():
            return
        at, now = at[rest], now[rest]
        free = ~_unordered(second[at], now, first_block)
        second[at[free]] = now[free]
        elsewhere = (first[at] ^ now) & _WARP != 0
        second[at[elsewhere]] = now[elsewhere]

    @staticmethod
    def _pair(what: str, against: str, now: np.ndarray, old: np.ndarray, clash: np.ndarray) -> str:
        return f"{what} by thread {now[clash][0] & _THREAD} against {against} by thread {old[clash][0] & _THREAD}"


@dataclass
class Buffer:
    address: int
    data: np.ndarray  # its bytes
    name: str
    shadow: Shadow | None  # None: too large to follow; bounds and alignment are checked all the same


class Memory:
    """Global memory: the buffers that were registered, and nothing else."""

    LARGEST_FOLLOWED = 1 << 26

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.open = False  # any address may be used, unchecked: for tensors that nobody registered

    def add(self, address: int, size: int, name: str, initialised: bool) -> None:
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        shadow = Shadow(size, initialised) if size <= self.LARGEST_FOLLOWED else None
        bisect.insort(self.buffers, Buffer(address, data, name, shadow), key=lambda b: b.address)

    def remove(self, address: int) -> None:
        self.buffers = [b for b in self.buffers if b.address != address]

    def find(self, address: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, Buffer | str]]:
        """Groups of accesses (as masks) with the buffer that each is in, or what is wrong with it."""
        left = np.ones(len(address), bool)
        while left.any():
            start = int(address[left][0])
            n = bisect.bisect_right(self.buffers, start, key=lambda b: b.address) - 1
            buffer = self.buffers[n] if n >= 0 else None
            if buffer is not None and start < buffer.address + len(buffer.data):
                group = left & (address >= buffer.address) & (address < buffer.address + len(buffer.data))
                over = group & (address + size > buffer.address + len(buffer.data))
                if over.any():
                    outside = int(address[over][0]) - buffer.address
                    yield over, f"{buffer.name}: {size} bytes at {outside} of {len(buffer.data)}"
                    group &= ~over
                    left &= ~over
                yield group, buffer
            elif self.open:
                group = left
                end = int(address.max()) + size
                start = int(address.min())
                data = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
                yield group, Buffer(start, data, "", None)
            else:
                group = left & (address == start)
                yield group, self._nearest(start, size)
            left &= ~group

    def _nearest(self, address: int, size: int) -> str:
        if not self.buffers:
            return f"{address:#x} is in no buffer"
        distance = [max(b.address - address, address - b.address - len(b.data) + 1) for b in self.buffers]
        buffer = self.buffers[int(np.argmin(distance))]
        return f"{buffer.name}: {size} bytes at {address - buffer.address} of {len(buffer.data)}"
