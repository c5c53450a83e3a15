"""A machine for the PTX that nvcc emitted: the second opinion beside the emulator, with which it shares no code.

Every thread of a block is a lane of NumPy arrays. The threads at the lowest program counter run together, which brings
diverged ones together again; in the schedule "warps" some of the warps, drawn anew at each branch and barrier, so that
they run ahead of each other as far as the barriers let them. Blocks run one after another. What it does not know it
refuses.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from ptx_instructions import (
    BOOL,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    U32,
    Action,
    Reader,
    Threads,
    assign,
    compile_instruction,
    numpy_type,
    reader,
    register_type,
)
from ptx_memory import Memory, Shadow, stamps
from ptx_module import Instruction, Kernel, PtxError, parse

READY, AT_BARRIER, IN_WARP_OPERATION, EXITED = range(4)
_CONTROL = {"bra": "branch", "brx": "branch", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}
_CONTROL |= {"shfl": "warp", "vote": "warp", "redux": "warp", "call": "assertion"}
_EPILOGUE = Instruction("end of the kernel", "?", -1, None, False, "ret", (), [])


class Module:
    """Parsed PTX; its kernels are compiled to Python functions when they are first launched."""

    def __init__(self, ptx: str) -> None:
        self.kernels = parse(ptx)
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> "Program":
        if name not in self._programs:
            self._programs[name] = Program(self.kernels[name])
        return self._programs[name]


class Program:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.readers: dict[tuple[str, np.dtype], Reader] = {}
        self.leaders = {*kernel.labels.values(), len(kernel.code)}  # where threads may come together again
        self.kinds = [_kind(i) for i in kernel.code]
        self.actions: list[Action | None] = [
            compile_instruction(kernel, i) if kind == "plain" else None
            for i, kind in zip(kernel.code, self.kinds, strict=True)
        ]


def _kind(i: Instruction) -> str:
    if i.opcode in ("bar", "barrier") and "warp" in i.modifiers:
        return "warp"
    return _CONTROL.get(i.opcode, "plain")


class Machine:
    """Runs launches of one module on registered host memory.

    `schedule`: "lockstep" or "warps". `approx_ulp`: every result of an .approx instruction is moved by a random number
    of ulp up to this one, for hardware whose last bits are not documented. `findings` holds what broke CUDA's rules.
    `executed` counts instructions by (kernel, opcode), once a warp; `requested` the bytes of the 32-byte sectors that
    the warps' loads and stores of global memory touch, by (kernel, "ld" or "st"); `moved` those that are not among the
    last RECENT sectors, which a cache holds.
    """

    MAX_STEPS = 5_000_000
    RECENT = 2048  # 64 KiB a block

    def __init__(self, module: Module, schedule: str = "lockstep", approx_ulp: int = 0, seed: int = 0) -> None:
        self.module, self.schedule, self.approx_ulp = module, schedule, approx_ulp
        self.random = np.random.default_rng(seed)
        self.memory = Memory()
        self.only_blocks: list[int] | None = None  # linear indices: of a grid too large to be run whole
        self._findings: dict[tuple[str, str, int], str] = {}
        self.count = False
        self.executed: Counter[tuple[str, str]] = Counter()
        self.requested: Counter[tuple[str, str]] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()
        self._recent: dict[tuple[int, bool], None] = {}
        self._serial = 0  # blocks run so far

    @property
    def findings(self) -> list[str]:
        return list(self._findings.values())

    def clear_findings(self) -> None:
        self._findings.clear()

    def report(self, kind: str, i: Instruction, what: str) -> None:
        where = f"{kind} at {i.at}, block {','.join(map(str, self.ctaid))}: `{i.text}`: {what}"
        self._findings.setdefault((kind, self.kernel.name, i.pc), where)

    # -- launches -----------------------------------------------------------------------------------------------------

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], dynamic_shared: int, arguments: list[bytes]
    ) -> None:
        self.program = self.module.program(name)
        self.kernel = kernel = self.program.kernel
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= 1024 or min(grid) < 1 or max(grid[1:]) > 65535 or grid[0] > 2**31 - 1:
            raise PtxError(f"invalid launch of {name}: grid {grid}, block {block}")
        self.ntid, self.nctaid = block, grid
        self.threads = np.arange(threads)
        self.tid = (self.threads % block[0], self.threads // block[0] % block[1], self.threads // block[0] // block[1])
        self.lane, self.warp = self.threads & 31, self.threads >> 5
        self._place_symbols(kernel, dynamic_shared, arguments)
        self._first_block = self._serial
        self._place_registers(kernel)
        blocks = list(range(grid[0] * grid[1] * grid[2])) if self.only_blocks is None else self.only_blocks
        if self.schedule != "lockstep":
            blocks = list(self.random.permutation(blocks))
        with np.errstate(all="ignore"):
            for b in blocks:
                self.ctaid = (int(b) % grid[0], int(b) // grid[0] % grid[1], int(b) // grid[0] // grid[1])
                self._run_block()
                self._serial += 1

    def _place_symbols(self, kernel: Kernel, dynamic_shared: int, arguments: list[bytes]) -> None:
        self.symbols: dict[str, int] = dict.fromkeys(kernel.constants, 0)
        end = 0
        for name, (alignment, size) in sorted(kernel.shared.items(), key=lambda s: s[1][1] is None):
            end = -(-end // alignment) * alignment
            self.symbols[name] = end
            end += dynamic_shared if size is None else size
        if end > 48 << 10:
            raise PtxError(f"{end} bytes of shared memory; beyond 48 KiB the launch would fail")
        self.shared_size = end
        last = kernel.parameters[-1]
        self.parameters = np.zeros(last[1] + last[2], np.uint8)
        for (name, offset, size), value in zip(kernel.parameters, arguments, strict=True):
            self.symbols[name] = offset
            self.parameters[offset : offset + size] = np.frombuffer(value, np.uint8)

    def _place_registers(self, kernel: Kernel) -> None:
        """All registers of a type in one array, so that a block clears them at once."""
        names: dict[np.dtype, list[str]] = {}
        for name, kind in kernel.registers.items():
            names.setdefault(register_type(kind), []).append(name)
        self._files = [np.zeros((len(of_type), len(self.threads)), dtype) for dtype, of_type in names.items()]
        rows = [zip(of_type, file, strict=True) for of_type, file in zip(names.values(), self._files, strict=True)]
        self.registers = {name: row for of_type in rows for name, row in of_type}

    # -- one block ----------------------------------------------------------------------------------------------------

    def _run_block(self) -> None:
        n, kernel = len(self.threads), self.kernel
        for file in self._files:
            file.fill(0)
        self.shared = np.full(self.shared_size, 0xFF, np.uint8)
        self.shared_shadow = Shadow(self.shared_size, False)
        self.local = np.full(n * kernel.local_size, 0xFF, np.uint8)
        self.epoch, self.warp_clock = 0, np.zeros(-(-n // 32), np.int64)
        self.pc, self.state = np.zeros(n, np.int64), np.full(n, READY)
        steps = 0
        while steps < self.MAX_STEPS:
            ready = self.state == READY
            if not ready.any():
                if (self.state == EXITED).all() or not self._release():
                    return
                continue
            if self.schedule != "lockstep":
                drawn = self.random.random(len(self.warp_clock)) < self.random.random()
                drawn[self.random.choice(self.warp[ready])] = True
                ready &= drawn[self.warp]
            pc = int(self.pc[ready].min())
            steps += self._run_together(pc, self.threads[ready & (self.pc == pc)])
        self.report("hang", kernel.code[min(pc, len(kernel.code) - 1)], f"{steps} steps")

    def _run_together(self, pc: int, index: np.ndarray) -> int:
        """Runs threads at one program counter up to the next place where threads part or meet."""
        program, start = self.program, pc
        threads: Threads = slice(None) if len(index) == len(self.threads) else index
        warps = len(np.unique(self.warp[index])) if self.count else 0
        while pc < len(program.kinds) and program.kinds[pc] == "plain":
            i = self.kernel.code[pc]
            if self.count:
                self.executed[self.kernel.name, i.opcode] += warps
            if i.predicate is None:
                program.actions[pc](self, threads)
            else:
                chosen = self._chosen(i, threads)
                if chosen.any():
                    program.actions[pc](self, threads if chosen.all() else index[chosen])
            pc += 1
            if pc in program.leaders:
                self.pc[index] = pc
                return pc - start
        i = self.kernel.code[pc] if pc < len(program.kinds) else _EPILOGUE
        if self.count:
            self.executed[self.kernel.name, i.opcode] += warps
        chosen = np.ones(len(index), bool) if i.predicate is None else self._chosen(i, threads)
        kind = program.kinds[pc] if i is not _EPILOGUE else "exit"
        if kind == "branch":
            self.pc[index] = np.where(chosen, self._target(i, index), pc + 1)
        elif kind == "exit":
            self.state[index[chosen]] = EXITED
            self.pc[index] = pc + 1
            self._try_warps(self.warp[index[chosen]])
        elif not chosen.all():
            raise PtxError(f"predicated {i.text}")
        elif kind == "assertion":
            if "__assertfail" not in i.operands:
                raise PtxError(i.text)
            self.report("assertion failed", i, "the kernel ends")
            self.state[:] = EXITED
        elif kind == "barrier":
            self.pc[index], self.state[index] = pc, AT_BARRIER
        else:
            self.pc[index], self.state[index] = pc, IN_WARP_OPERATION
            if i.opcode == "shfl" and i.operands[-1] in ("-1", "0xffffffff"):
                index = self._shuffle_whole_warps(i, index)
            self._try_warps(self.warp[index])
        return pc + 1 - start

    def _chosen(self, i: Instruction, threads: Threads) -> np.ndarray:
        return self.registers[i.predicate][threads] ^ i.negated

    def _target(self, i: Instruction, index: np.ndarray) -> np.ndarray:
        labels = self.kernel.labels
        if i.opcode == "bra":
            return np.array(labels[i.operands[-1]])
        table = np.array([labels[t] for t in self.kernel.branch_targets[i.operands[1]]])
        return table[self.registers[i.operands[0]][index]]

    def _release(self) -> bool:
        """Opens the barrier that all threads wait at; False where they wait for one another."""
        waiting = self.state != EXITED
        places = sorted(set(self.pc[waiting]))
        i = self.kernel.code[places[0]]
        if (self.state == IN_WARP_OPERATION).any():
            self.report("deadlock", i, "threads wait at " + ", ".join(self.kernel.code[p].at for p in places))
            return False
        if len(places) > 1:
            self.report("barrier", i, "threads of the block wait at different barriers")
        if not waiting.all():
            self.report("barrier", i, "threads of the block have exited without reaching it")
        self.state[waiting] = READY
        self.pc[waiting] += 1
        self.epoch += 1
        self.warp_clock[:] = 0
        return True

    # -- warp operations ----------------------------------------------------------------------------------------------

    def _try_warps(self, warps: np.ndarray) -> None:
        """Carries out the warp operations for which every lane of their mask is there."""
        for w in np.unique(warps):
            lanes = self.threads[w * 32 : w * 32 + 32]
            waiting = lanes[self.state[lanes] == IN_WARP_OPERATION]
            for pc in np.unique(self.pc[waiting]):
                i = self.kernel.code[pc]
                here = waiting[self.pc[waiting] == pc]
                masks = np.broadcast_to(self._value(i.operands[-1] if i.operands else "-1", here), (len(here),))
                for mask in np.unique(masks):
                    callers = here[masks == mask]
                    members = lanes[(int(mask) >> (lanes & 31)) & 1 == 1]
                    if not np.isin(callers, members).all():
                        self.report("lane", i, f"mask {int(mask):08x} leaves out a lane that calls")
                    if np.isin(members[self.state[members] != EXITED], callers).all():
                        self._warp_operation(i, callers)
                        self.state[callers], self.pc[callers] = READY, pc + 1

    def _shuffle_whole_warps(self, i: Instruction, index: np.ndarray) -> np.ndarray:
        """Carries out a shuffle of all lanes in those warps that are there in full; returns the threads left."""
        whole = np.bincount(self.warp[index], minlength=len(self.warp_clock)) == np.bincount(self.warp)
        chosen = whole[self.warp[index]]
        if chosen.any():
            lanes = index[chosen]
            self._shuffle(i, lanes)
            self.state[lanes], self.pc[lanes] = READY, self.pc[lanes] + 1
        return index[~chosen]

    def _value(self, operand: str, threads: np.ndarray, dtype: np.dtype = U32) -> np.ndarray:
        key = (operand, dtype)
        if key not in self.program.readers:
            self.program.readers[key] = reader(self.kernel, operand, dtype)
        return self.program.readers[key](self, threads)

    def _warp_operation(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.opcode in ("bar", "barrier"):
            self.warp_clock[lanes[0] >> 5] += 1
        elif i.opcode == "vote":
            votes = np.broadcast_to(self._value(i.operands[1].lstrip("!"), lanes, BOOL), (len(lanes),))
            votes = votes ^ i.operands[1].startswith("!")
            if "ballot" in i.modifiers:
                ballot = sum(1 << int(lane & 31) for lane in lanes[votes])
                assign(self, i.operands[0], lanes, np.array(ballot, np.uint32))
            else:
                assign(self, i.operands[0], lanes, np.array(votes.all() if "all" in i.modifiers else votes.any()))
        elif i.opcode == "redux":
            values = self._value(i.operands[1], lanes, numpy_type(i.modifiers[-1]))
            reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
            assign(self, i.operands[0], lanes, reduce[i.modifiers[1]].reduce(values))
        else:
            self._shuffle(i, lanes)

    def _shuffle(self, i: Instruction, lanes: np.ndarray) -> None:
        """As the PTX manual puts it: c holds the segment mask (8..12) and the clamp (0..4)."""
        value, b, c = (np.broadcast_to(self._value(o, lanes), (len(lanes),)) for o in i.operands[1:4])
        lane, segment, clamp, b = lanes & 31, c >> 8 & 31, c & 31, b & 31
        low, high = lane & segment, lane & segment | clamp & ~segment & 31
        mode = i.modifiers[1]
        up, down = lane - b.astype(np.int64), lane + b.astype(np.int64)
        source = {"up": up, "down": down, "bfly": lane ^ b, "idx": low | b & ~segment & 31}[mode].astype(np.int64)
        within = source >= high if mode == "up" else source <= high
        source = np.where(within, source, lane)
        position = np.full(len(self.warp_clock) * 32, -1)
        position[lanes] = np.arange(len(lanes))
        taken = position[(lanes & ~31) + source]
        if (taken < 0).any():
            self.report("lane", i, f"reads lane {source[taken < 0][0]}, which takes no part")
        target, _, predicate = i.operands[0].partition("|")
        assign(self, target, lanes, np.where(taken < 0, 0x7FC0DEAD, value[taken]).astype(np.uint32))
        if predicate:
            assign(self, predicate, lanes, within)

    # -- what instructions use ----------------------------------------------------------------------------------------

    def perturb(self, x: np.ndarray) -> np.ndarray:
        """What hardware may give for the correctly rounded x. The f64 approximations have their upper half only."""
        if x.dtype == np.float64:
            bits = np.array(x, np.float64).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
            return np.where(np.isfinite(x), bits.view(np.float64), x)
        if not self.approx_ulp:
            return x
        x = np.array(x, np.float32, ndmin=1)
        step = self.random.integers(-self.approx_ulp, self.approx_ulp + 1, x.shape).astype(np.int32)
        exact = ~np.isfinite(x) | (np.abs(x) < 1e-36) | (x == 1)
        return (x.view(np.int32) + np.where(exact, 0, step)).astype(np.int32).view(np.float32)

    def locate(
        self, i: Instruction, space: str, address: np.ndarray, size: int, threads: np.ndarray, write: bool, atomic: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Checks an access and yields (which threads, bytes, offsets) of what may be carried out of it."""
        if space == "generic":
            space = "global"
            for name, window in (("param", PARAM_WINDOW), ("local", LOCAL_WINDOW), ("shared", SHARED_WINDOW)):
                if (address >= window).all():
                    space, address = name, address - window
                    break
        if (misaligned := address % size != 0).any():
            self.report("misaligned", i, f"{size} bytes at an address of {address[misaligned][0] % size} mod {size}")
        everything = np.ones(len(threads), bool)
        if space == "global":
            if self.count:
                self._count_sectors(address, size, threads, write)
            for group, buffer in self.memory.find(address, size):
                if isinstance(buffer, str):
                    self.report("out of bounds", i, buffer)
                    continue
                offset = address[group] - buffer.address
                if buffer.shadow is not None:
                    self._check(i, buffer.shadow, buffer.name, offset, size, threads[group], write, atomic)
                yield group, buffer.data, offset
            return
        data = {"shared": self.shared, "local": self.local, "param": self.parameters}[space]
        limit = self.kernel.local_size if space == "local" else len(data)
        inside = (address >= 0) & (address + size <= limit)
        if not inside.all():
            self.report("out of bounds", i, f"{space} memory: {size} bytes at {address[~inside][0]} of {limit}")
        offset = address[inside] + (threads[inside] * limit if space == "local" else 0)
        if space == "shared":
            self._check(i, self.shared_shadow, "shared memory", offset, size, threads[inside], write, atomic)
        yield (everything if inside.all() else inside), data, offset

    def _check(
        self,
        i: Instruction,
        shadow: Shadow,
        name: str,
        offset: np.ndarray,
        size: int,
        threads: np.ndarray,
        write: bool,
        atomic: bool,
    ) -> None:
        now = stamps(self._serial, self.epoch, self.warp_clock[self.warp[threads]], threads)
        for kind, what in shadow.access(offset, size, now, self._first_block, write, atomic):
            self.report(kind, i, f"{name}: {what}")

    def _count_sectors(self, address: np.ndarray, size: int, threads: np.ndarray, write: bool) -> None:
        touched = (address // 32)[:, None] + np.arange(-(-size // 32))
        sectors = np.unique(np.stack([np.repeat(self.warp[threads], touched.shape[1]), touched.ravel()]), axis=1)
        key = (self.kernel.name, "st" if write else "ld")
        self.requested[key] += 32 * sectors.shape[1]
        for sector in np.unique(touched):
            if (sector, write) in self._recent:
                del self._recent[sector, write]
            else:
                self.moved[key] += 32
            self._recent[sector, write] = None
            if len(self._recent) > self.RECENT:
                del self._recent[next(iter(self._recent))]
