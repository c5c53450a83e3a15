"""What each PTX instruction does, as a function of the machine and of the threads that execute it.

Registers hold unsigned integers, or booleans for predicates; an instruction views them as its own type. Float
arithmetic is done in the next wider type and rounded once, fused multiply-adds included (see _fma64).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_module import Instruction, Kernel, PtxError, split_operands

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}
BOOL = np.dtype(np.bool_)
U32, U64 = np.dtype(np.uint32), np.dtype(np.uint64)
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61, 1 << 62  # where generic addresses of these begin

Threads = slice | np.ndarray
Reader = Callable[[Any, Threads], np.ndarray]
Action = Callable[[Any, Threads], None]  # (machine, threads)


def numpy_type(name: str) -> np.dtype:
    if name == "pred":
        return BOOL
    size = int(name[1:]) // 8
    return np.dtype({"f": FLOAT, "s": SIGNED}.get(name[0], UNSIGNED)[size])


def register_type(name: str) -> np.dtype:
    return BOOL if name == "pred" else np.dtype(UNSIGNED[int(name[1:]) // 8])


# -- operands ---------------------------------------------------------------------------------------------------------


def reader(kernel: Kernel, operand: str, dtype: np.dtype) -> Reader:
    """The value of a register, special register, literal or symbol as `dtype`."""
    if operand in kernel.registers:
        return lambda m, threads: as_type(m.registers[operand][threads], dtype)
    if s := re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", operand):
        axis = "xyz".index(s[2])
        if s[1] == "tid":
            return lambda m, threads: m.tid[axis][threads].astype(dtype)
        return lambda m, threads: np.array({"ntid": m.ntid, "ctaid": m.ctaid, "nctaid": m.nctaid}[s[1]][axis], dtype)
    if operand == "%laneid":
        return lambda m, threads: m.lane[threads].astype(dtype)
    if operand == "%warpid":
        return lambda m, threads: m.warp[threads].astype(dtype)
    if s := re.fullmatch(r"%lanemask_(eq|lt|le|gt|ge)", operand):
        bit = np.uint64(1) << np.arange(32, dtype=np.uint64)
        below = {"eq": bit, "lt": bit - 1, "le": 2 * bit - 1, "gt": ~(2 * bit - 1), "ge": ~(bit - 1)}[s[1]]
        masks = below.astype(np.uint32)
        return lambda m, threads: masks[m.lane[threads]].astype(dtype)
    if (constant := _literal(operand, dtype)) is not None:
        return lambda m, threads: constant
    if operand in kernel.local:
        return lambda m, threads: np.array(kernel.local[operand], dtype)
    if re.fullmatch(r"[\w$]+", operand):
        return lambda m, threads: np.array(m.symbols[operand], dtype)
    raise PtxError(f"operand {operand}")


def _literal(text: str, dtype: np.dtype) -> np.ndarray | None:
    if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
        return np.array(int(m[1], 16), np.uint32).view(np.float32)
    if m := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
        return np.array(int(m[1], 16), np.uint64).view(np.float64)
    if not re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return None
    value = int(text.rstrip("U"), 0)
    if dtype == BOOL:
        return np.array(bool(value))
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(dtype)


def as_type(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if value.dtype == BOOL or value.dtype == dtype:
        return value
    if value.itemsize == dtype.itemsize:
        return value.view(dtype)
    return value.astype(UNSIGNED[dtype.itemsize]).view(dtype)


def assign(m: Any, register: str, threads: Threads, value: np.ndarray) -> None:
    """A register wider than the value is filled as the value's type extends."""
    if register == "_":
        return
    target = m.registers[register]
    value = np.asarray(value)
    if target.dtype != BOOL and value.dtype != target.dtype:
        if value.itemsize != target.itemsize:
            value = value.astype({"i": SIGNED, "u": UNSIGNED}[value.dtype.kind][target.itemsize])
        value = value.view(target.dtype)
    target[threads] = value


# -- arithmetic -------------------------------------------------------------------------------------------------------


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal floats to zero."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c from the exact product (Dekker) and the exact sum (Knuth), which is off by one rounding at most."""

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    product = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    low = al * bl - (((product - ah * bh) - al * bh) - ah * bl)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)
    fused = total + (rest + low)
    return np.where(np.isfinite(fused), fused, total)


def _nan_aware(choose: Callable[..., np.ndarray], propagate: bool) -> Callable[..., np.ndarray]:
    return (lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, choose(a, b))) if propagate else choose


FLOAT_OPS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "neg": np.negative,
    "abs": np.abs,
    "copysign": lambda a, b: np.copysign(b, a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def _rounded_up(x: np.ndarray) -> np.ndarray:
    """To single precision, and in _rounded_down likewise."""
    y = x.astype(np.float32)
    return np.where(y < x, np.nextafter(y, np.float32(np.inf)), y)


def _rounded_down(x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float32)
    return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)


DIRECTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rm": _rounded_down,
    "rp": _rounded_up,
    "rz": lambda x: np.where(x > 0, _rounded_down(x), _rounded_up(x)),
}


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. Division by zero is not defined; all bits set is what hardware gives."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    if a.dtype.kind == "u":
        return np.where(b == 0, np.iinfo(a.dtype).max, a // safe).astype(a.dtype)
    quotient = a // safe
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> np.array(32, wide)).astype(a.dtype)
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    xl, xh, yl, yh = x & mask, x >> half, y & mask, y >> half
    middle = xh * yl + ((xl * yl) >> half)
    carry = (middle & mask) + xl * yh
    high = xh * yh + (middle >> half) + (carry >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.astype(a.dtype)


def _count_bits(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(np.uint32)


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    bits, a = 8 * a.itemsize, a.copy()
    for shift in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        a |= a >> np.array(shift, a.dtype)
    return (bits - np.bitwise_count(a)).astype(np.uint32)


def _reverse_bits(a: np.ndarray) -> np.ndarray:
    data = np.ascontiguousarray(np.atleast_1d(a)).view(np.uint8).reshape(-1, a.itemsize)
    bits = np.unpackbits(data, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(a.dtype)[:, 0]


INTEGER_OPS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "neg": lambda a: np.subtract(np.zeros((), a.dtype), a),
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "div": _divide,
    "rem": lambda a, b: (a - _divide(a, b) * b).astype(a.dtype),
    "popc": _count_bits,
    "clz": _leading_zeros,
    "brev": _reverse_bits,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}
LOGICAL_OPS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros((), bool)
    if how in ("nan", "num"):
        return nan if how == "nan" else ~nan
    if how in COMPARISONS:
        return COMPARISONS[how](a, b) & ~nan
    return COMPARISONS[how.removesuffix("u")](a, b) | nan


def _shift(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    """By the width and more too: zero, or the sign."""
    bits = 8 * a.itemsize
    within = np.minimum(by, bits - 1).astype(a.dtype)
    if left:
        return np.where(by >= bits, np.zeros((), a.dtype), a << within)
    beyond = a >> np.array(bits - 1, a.dtype) if a.dtype.kind == "i" else np.zeros((), a.dtype)
    return np.where(by >= bits, beyond, a >> within)


def _ones(count: np.ndarray) -> np.ndarray:
    """That many low bits, as uint64."""
    count = np.asarray(count).astype(np.uint64)
    return np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1))


def _insert_field(a: np.ndarray, b: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    at = (at & np.uint32(255)).astype(np.uint64)
    mask = _ones(length & np.uint32(255)) << np.minimum(at, np.uint64(63))
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << at) & mask)).astype(b.dtype)


def _extract_field(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "i":
        raise PtxError("bfe of a signed type")
    return ((a.astype(np.uint64) >> (at & np.uint32(255)).astype(np.uint64)) & _ones(length & np.uint32(255))).astype(
        a.dtype
    )


def _funnel_shift(flags: set[str]) -> Callable[..., np.ndarray]:
    def run(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = (by & np.uint32(31) if "wrap" in flags else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << by) >> np.uint64(32) if "l" in flags else both >> by).astype(np.uint32)

    return run


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    selector = selector.astype(np.uint64)
    result = np.zeros((), np.uint64)
    for n in range(4):
        nibble = (selector >> np.uint64(4 * n)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * n))
    return result.astype(np.uint32)


def _lookup_logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros((), np.uint32)
    for n in range(8):
        if int(table) >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def _test_class(mods: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    tiny = np.finfo(x.dtype).tiny
    return {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda: (x != 0) & (np.abs(x) < tiny),
    }[mods[0]]()


# -- conversions ------------------------------------------------------------------------------------------------------

ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Saturated; NaN is 0 for 32 bits and less, and 0x8000... for 64."""
    info = np.iinfo(dtype)
    clipped = np.clip(np.where(np.isnan(x), 0, x).astype(np.float64), float(info.min), float(info.max))
    top = clipped >= float(info.max)
    value = np.where(top, 0, clipped).astype(dtype)
    value = np.where(top, np.array(info.max, dtype), value)
    nan = np.array(1 << 63, np.uint64).view(dtype) if dtype.itemsize == 8 else np.zeros((), dtype)
    return np.where(np.isnan(x), nan, value).astype(dtype)


def _conversion(kernel: Kernel, i: Instruction) -> Action:
    to, source = (m for m in i.modifiers if re.fullmatch(r"[busf]\d+|bf16|[b]?f16x2", m))
    flags = set(i.modifiers)
    target = i.operands[0]
    if to in ("bf16", "bf16x2", "f16x2"):
        if source != "f32" or flags & {"relu", "rz", "satfinite"}:
            raise PtxError(i.text)
        values = [reader(kernel, o, np.dtype(np.float32)) for o in i.operands[1:]]

        def half(x: np.ndarray) -> np.ndarray:
            return x.astype(np.float16).view(np.uint16) if to == "f16x2" else bfloat16(x)

        def pack(m: Any, threads: Threads) -> None:
            parts = [half(v(m, threads)) for v in values]
            packed = parts[0] if len(parts) == 1 else (parts[0].astype(np.uint32) << np.uint32(16)) | parts[1]
            assign(m, target, threads, packed)

        return pack
    if source == "bf16":
        bits = reader(kernel, i.operands[1], np.dtype(np.uint16))
        return lambda m, threads: assign(m, target, threads, bits(m, threads).astype(np.uint32) << np.uint32(16))
    dtype = numpy_type(to)
    value = reader(kernel, i.operands[1], numpy_type(source))
    rounding = next((ROUNDING[f] for f in i.modifiers if f in ROUNDING), None)
    if flags & {"rz", "rm", "rp", "rna"} or ("sat" in flags and dtype.kind != "f"):
        raise PtxError(i.text)

    def convert(m: Any, threads: Threads) -> None:
        x = value(m, threads)
        if "ftz" in flags and x.dtype == np.float32:
            x = flush(x)
        if x.dtype.kind == "f" and dtype.kind != "f":
            x = _to_integer(rounding(x), dtype)
        else:
            x = (rounding(x) if rounding else x).astype(dtype)
        if "ftz" in flags and dtype == np.float32:
            x = flush(x)
        if "sat" in flags:
            x = np.clip(np.where(np.isnan(x), 0, x), 0, 1).astype(dtype)
        assign(m, target, threads, x)

    return convert


# -- instructions -----------------------------------------------------------------------------------------------------


def compile_instruction(kernel: Kernel, i: Instruction) -> Action:
    """The effect of an instruction other than branches, barriers and warp operations."""
    mods, operands, flags = i.modifiers, i.operands, set(i.modifiers)
    if i.opcode == "st" and "param" in flags:  # an argument of a call, of which assertions are known
        return lambda m, threads: None
    if i.opcode in ("ld", "st", "atom", "red"):
        return _memory_access(kernel, i)
    if i.opcode in ("membar", "fence", "prefetch"):
        return lambda m, threads: None
    if i.opcode == "trap":
        return lambda m, threads: m.report("trap", i, "")
    if i.opcode == "cvt":
        return _conversion(kernel, i)
    if not mods or not re.fullmatch(r"[busf]\d+|pred", mods[-1]):
        raise PtxError(i.text)
    dtype = numpy_type(mods[-1])
    target = operands[0]
    if i.opcode == "mov" and "{" in i.text:
        return _pack(kernel, operands, dtype)
    if i.opcode in ("mov", "cvta"):
        space = next((w for s, w in WINDOWS.items() if s in flags), 0) if i.opcode == "cvta" else 0
        step = np.array(-space if "to" in flags else space, np.int64).astype(np.uint64)
        value = reader(kernel, operands[1], dtype)
        if not space:
            return lambda m, threads: assign(m, target, threads, value(m, threads))
        return lambda m, threads: assign(m, target, threads, value(m, threads) + step)
    if i.opcode == "setp":
        return _set_predicate(kernel, i, dtype)
    if i.opcode == "selp":
        a, b = (reader(kernel, o, dtype) for o in operands[1:3])
        p = reader(kernel, operands[3], BOOL)
        return lambda m, t: assign(m, target, t, np.where(p(m, t), a(m, t), b(m, t)))
    if i.opcode == "testp":
        x = reader(kernel, operands[1], dtype)
        return lambda m, t: assign(m, target, t, _test_class(mods, x(m, t)))
    if i.opcode in FIELD_OPS:
        types, operation = FIELD_OPS[i.opcode](dtype, flags)
        values = [reader(kernel, o, t) for o, t in zip(operands[1:], types, strict=True)]
        return lambda m, t: assign(m, target, t, operation(*(v(m, t) for v in values)))
    if dtype == BOOL:
        values = [reader(kernel, o, BOOL) for o in operands[1:]]
        return lambda m, t: assign(m, target, t, LOGICAL_OPS[i.opcode](*(v(m, t) for v in values)))
    return _float_operation(kernel, i, dtype) if dtype.kind == "f" else _integer_operation(kernel, i, dtype)


WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
FIELD_OPS: dict[str, Callable[[np.dtype, set[str]], tuple[tuple[np.dtype, ...], Callable[..., np.ndarray]]]] = {
    "shl": lambda t, _: ((t, U32), lambda a, by: _shift(a, by, True)),
    "shr": lambda t, _: ((t, U32), lambda a, by: _shift(a, by, False)),
    "bfi": lambda t, _: ((t, t, U32, U32), _insert_field),
    "bfe": lambda t, _: ((t, U32, U32), _extract_field),
    "bmsk": lambda t, _: ((U32, U32), lambda at, n: _insert_field(~np.uint32(0), np.uint32(0), at, n)),
    "shf": lambda t, flags: ((U32, U32, U32), _funnel_shift(flags)),
    "prmt": lambda t, _: ((U32, U32, U32), _permute_bytes),
    "lop3": lambda t, _: ((U32, U32, U32, U32), _lookup_logic),
}


def _pack(kernel: Kernel, operands: list[str], dtype: np.dtype) -> Action:
    """mov between a register and several narrower ones, {low, ..., high}."""
    packing = operands[1].startswith("{")
    parts = split_operands(operands[packing][1:-1])
    size = dtype.itemsize // len(parts)
    whole = np.dtype(UNSIGNED[dtype.itemsize])
    part = np.dtype(UNSIGNED[size])
    shifts = [np.array(8 * size * n, whole) for n in range(len(parts))]
    if packing:
        values = [reader(kernel, p, part) for p in parts]

        def pack(m: Any, threads: Threads) -> None:
            result = np.zeros((), whole)
            for value, shift in zip(values, shifts, strict=True):
                result = result | (value(m, threads).astype(whole) << shift)
            assign(m, operands[0], threads, result)

        return pack
    value = reader(kernel, operands[1], whole)

    def unpack(m: Any, threads: Threads) -> None:
        x = value(m, threads)
        for p, shift in zip(parts, shifts, strict=True):
            assign(m, p, threads, (x >> shift).astype(part))

    return unpack


def _set_predicate(kernel: Kernel, i: Instruction, dtype: np.dtype) -> Action:
    a, b = (reader(kernel, o, dtype) for o in i.operands[1:3])
    combine = next((LOGICAL_OPS[f] for f in i.modifiers[1:] if f in LOGICAL_OPS), None)
    target, _, complement = i.operands[0].partition("|")
    negated = combine is not None and i.operands[3].startswith("!")
    other = reader(kernel, i.operands[3].lstrip("!"), BOOL) if combine else None

    def run(m: Any, threads: Threads) -> None:
        result = _compare(i.modifiers[0], a(m, threads), b(m, threads))
        opposite = ~result
        if combine:
            extra = other(m, threads) ^ negated
            result, opposite = combine(result, extra), combine(opposite, extra)
        assign(m, target, threads, result)
        if complement:
            assign(m, complement, threads, opposite)

    return run


def _float_operation(kernel: Kernel, i: Instruction, dtype: np.dtype) -> Action:
    flags = set(i.modifiers)
    directed = next((DIRECTED[f] for f in i.modifiers if f in DIRECTED), None)
    half = dtype.itemsize == 2 and i.opcode not in ("neg", "abs")
    if flags & {"xorsign", "relu"} or half or (directed and dtype.itemsize != 4):
        raise PtxError(i.text)
    values = [reader(kernel, o, dtype) for o in i.operands[1:]]
    wide = np.float64
    operation = FLOAT_OPS.get(i.opcode)
    if i.opcode in ("max", "min"):
        operation = _nan_aware(np.fmax if i.opcode == "max" else np.fmin, "NaN" in flags)
    elif dtype.itemsize == 8 and i.opcode == "fma":
        operation = _fma64
    if operation is None:
        raise PtxError(i.text)
    approximate = "approx" in flags or i.opcode == "tanh"

    def run(m: Any, threads: Threads) -> None:
        x = [v(m, threads) for v in values]
        if "ftz" in flags and dtype.itemsize == 4:
            x = [flush(v) for v in x]
        exact = np.asarray(operation(*(v.astype(wide) for v in x)))
        result = directed(exact) if directed else exact.astype(dtype)
        if approximate:
            result = m.perturb(result)
        if "sat" in flags:
            result = np.clip(np.where(np.isnan(result), 0, result), 0, 1).astype(dtype)
        if "ftz" in flags and dtype.itemsize == 4:
            result = flush(result)
        assign(m, i.operands[0], threads, result)

    return run


def _integer_operation(kernel: Kernel, i: Instruction, dtype: np.dtype) -> Action:
    flags = set(i.modifiers)
    if flags & {"cc", "sat"}:
        raise PtxError(i.text)
    wide = "wide" in flags
    result_type = np.dtype((SIGNED if dtype.kind == "i" else UNSIGNED)[dtype.itemsize * 2]) if wide else dtype
    operation = INTEGER_OPS.get(i.opcode)
    if i.opcode in ("mul", "mad"):

        def operation(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
            product = _high_product(a, b) if "hi" in flags else a.astype(result_type) * b.astype(result_type)
            return (product + c[0]).astype(result_type) if c else product

    if operation is None:
        raise PtxError(i.text)
    values = [reader(kernel, o, result_type if n == 2 else dtype) for n, o in enumerate(i.operands[1:])]
    return lambda m, t: assign(m, i.operands[0], t, operation(*(v(m, t) for v in values)))


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory_access(kernel: Kernel, i: Instruction) -> Action:
    space = next((f for f in i.modifiers if f in ("global", "shared", "local", "param", "const")), "generic")
    if space == "const":
        raise PtxError(i.text)
    dtype = numpy_type(next(f for f in reversed(i.modifiers) if re.fullmatch(r"[busf]\d+", f)))
    count = next((int(f[1]) for f in i.modifiers if f in ("v2", "v4", "v8")), 1)
    size = dtype.itemsize * count
    place = next(o for o in i.operands if o.startswith("["))
    base, offset = re.fullmatch(r"\[([%\w$]+)\s*([+-]\s*-?\w+)?\]", place).groups()
    displacement = np.array(int((offset or "0").replace(" ", "").replace("+-", "-"), 0), np.int64)
    base_value = reader(kernel, base, U32 if kernel.registers.get(base, "b64").endswith("32") else U64)
    lanes = np.arange(size)

    def address(m: Any, threads: np.ndarray) -> np.ndarray:
        start = np.asarray(base_value(m, threads)).astype(np.int64)
        return np.broadcast_to(start + displacement, (len(threads),)).copy()

    def each(m: Any, threads: np.ndarray, write: bool, atomic: bool = False) -> Any:
        return m.locate(i, space, address(m, threads), size, threads, write, atomic)

    if i.opcode == "ld":
        registers = split_operands(i.operands[0].strip("{}"))

        def load(m: Any, threads: Threads) -> None:
            index = m.threads[threads]
            raw = np.full((len(index), size), 0xFF, np.uint8)
            for group, data, at in each(m, index, False):
                raw[group] = data[at[:, None] + lanes]
            values = raw.view(dtype)
            for n, r in enumerate(registers):
                assign(m, r, threads, np.ascontiguousarray(values[:, n]))

        return load
    if i.opcode == "st":
        sources = [reader(kernel, r, dtype) for r in split_operands(i.operands[1].strip("{}"))]

        def store(m: Any, threads: Threads) -> None:
            index = m.threads[threads]
            values = np.empty((len(index), count), dtype)
            for n, source in enumerate(sources):
                values[:, n] = source(m, index)
            raw = values.view(np.uint8).reshape(len(index), size)
            for group, data, at in each(m, index, True):
                data[at[:, None] + lanes] = raw[group]

        return store
    returning = i.opcode == "atom"
    sources = [reader(kernel, o, dtype) for o in i.operands[1 + returning :]]
    name = next(f for f in i.modifiers if f in ATOMICS)

    def atomic(m: Any, threads: Threads) -> None:
        index = m.threads[threads]
        values = [np.broadcast_to(s(m, index), (len(index),)) for s in sources]
        old = np.zeros(len(index), dtype)
        for group, data, at in each(m, index, True, True):
            members = np.flatnonzero(group)
            for n in m.random.permutation(len(members)):  # the lanes in any order
                cell = data[at[n] : at[n] + size].view(dtype)
                old[members[n]] = cell[0]
                cell[0] = ATOMICS[name](cell[0], *(v[members[n]] for v in values))
        if returning:
            assign(m, i.operands[0], threads, old)

    return atomic


ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "cas": lambda old, expected, x: x if old == expected else old,
}
