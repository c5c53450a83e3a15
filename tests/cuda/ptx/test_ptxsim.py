"""The interpreter itself: instructions against exact arithmetic, and each of the checker's rules. Needs no nvcc."""

from fractions import Fraction
from typing import Any

import numpy as np
import ptxsim
import pytest

LANES = np.arange(64)


def run(body: str, *buffers: tuple[np.ndarray, bool], threads: int = 64, blocks: int = 1, **options: Any) -> list[str]:
    """Runs one kernel whose parameters are `buffers` (array, initialised), in %rd1, %rd2...; returns the findings."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(len(buffers)))
    loads = "".join(f"ld.param.u64 %rd{n + 1}, [p{n}];\n" for n in range(len(buffers)))
    offsets = "mov.u32 %r1, %tid.x; mul.wide.u32 %rd10, %r1, 4; mul.wide.u32 %rd11, %r1, 8;\n"
    ptx = f"""
    .version 9.0
    .target sm_90
    .visible .entry k({parameters})
    {{
      .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<40>; .reg .f64 %fd<9>;
      .shared .align 4 .b8 tile[256];
      {loads}{offsets}{body}
      ret;
    }}"""
    machine = ptxsim.Machine(ptxsim.Module(ptx), **options)
    for n, (array, initialised) in enumerate(buffers):
        machine.memory.add(array.ctypes.data, array.nbytes, f"buffer {n}", initialised)
    arguments = [int(array.ctypes.data).to_bytes(8, "little") for array, _ in buffers]
    machine.launch("k", (blocks, 1, 1), (threads, 1, 1), 0, arguments)
    return machine.findings


def evaluate(instruction: str, *inputs: np.ndarray, result: str) -> np.ndarray:
    """The instruction's `result` register for lanes that hold `inputs` (as %rd21, %rd22... or %r21...)."""
    size = {"%rd": 8, "%fd": 8}.get(result[:3], 4)
    out = np.zeros(64 * size, np.uint8)
    body = "".join(
        f"add.s64 %rd12, %rd{n + 1}, {'%rd11' if x.itemsize == 8 else '%rd10'};\n"
        f"ld.global.b{8 * x.itemsize} {'%rd' if x.itemsize == 8 else '%r'}{21 + n}, [%rd12];\n"
        for n, x in enumerate(inputs)
    )
    store = f"add.s64 %rd12, %rd{len(inputs) + 1}, {'%rd11' if size == 8 else '%rd10'};\n"
    store += f"st.global.b{8 * size} [%rd12], {result};"
    assert run(body + instruction + store, *((x, True) for x in inputs), (out, False)) == []
    return out.view({8: np.uint64, 4: np.uint32}[size])


RANDOM = np.random.default_rng(0)
A32, B32 = (RANDOM.integers(0, 1 << 32, 64, np.uint64).astype(np.uint32) for _ in range(2))
A64, B64 = (RANDOM.integers(0, 1 << 63, 64, np.uint64) * np.uint64(2) + np.uint64(1) for _ in range(2))
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add.s32 %r30, %r21, %r22;": (A32, B32, lambda a, b: a + b),
    "mul.hi.u32 %r30, %r21, %r22;": (A32, B32, lambda a, b: a * b >> 32),
    "mul.hi.s32 %r30, %r21, %r22;": (A32, B32, lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
    "mul.wide.s32 %rd30, %r21, %r22;": (A32, B32, lambda a, b: signed(a, 32) * signed(b, 32)),
    "mad.lo.s32 %r30, %r21, %r22, %r21;": (A32, B32, lambda a, b: a * b + a),
    "div.s32 %r30, %r21, %r22;": (A32, B32, lambda a, b: towards_zero(signed(a, 32), signed(b, 32))),
    "rem.s32 %r30, %r21, 1000;": (A32, B32, lambda a, b: signed(a, 32) - 1000 * towards_zero(signed(a, 32), 1000)),
    "shf.l.wrap.b32 %r30, %r21, %r22, 5;": (A32, B32, lambda a, b: (b << 32 | a) << 5 >> 32),
    "shf.r.wrap.b32 %r30, %r21, %r22, 37;": (A32, B32, lambda a, b: (b << 32 | a) >> 5),
    "prmt.b32 %r30, %r21, %r22, 0x7610;": (A32, B32, lambda a, b: b & 0xFFFF0000 | a & 0xFFFF),
    "bfi.b32 %r30, %r21, %r22, 7, 9;": (A32, B32, lambda a, b: b & ~(511 << 7) | (a & 511) << 7),
    "bfe.u32 %r30, %r21, 7, 9;": (A32, B32, lambda a, b: a >> 7 & 511),
    "lop3.b32 %r30, %r21, %r22, %r21, 0x28;": (A32, B32, lambda a, b: a & ~b),
    "popc.b32 %r30, %r21;": (A32, B32, lambda a, b: bin(a).count("1")),
    "clz.b32 %r30, %r21;": (A32 >> np.uint32(9), B32, lambda a, b: 32 - a.bit_length()),
    "brev.b32 %r30, %r21;": (A32, B32, lambda a, b: int(f"{a:032b}"[::-1], 2)),
    "shr.s32 %r30, %r21, 40;": (A32, B32, lambda a, b: signed(a, 32) >> 40),
    "shl.b32 %r30, %r21, 32;": (A32, B32, lambda a, b: 0),
    "mul.lo.s64 %rd30, %rd21, %rd22;": (A64, B64, lambda a, b: a * b),
    "mul.hi.u64 %rd30, %rd21, %rd22;": (A64, B64, lambda a, b: a * b >> 64),
    "mul.hi.s64 %rd30, %rd21, %rd22;": (A64, B64, lambda a, b: signed(a, 64) * signed(b, 64) >> 64),
    "div.s64 %rd30, %rd21, 12345;": (A64, B64, lambda a, b: towards_zero(signed(a, 64), 12345)),
    "min.s64 %rd30, %rd21, %rd22;": (A64, B64, lambda a, b: min(signed(a, 64), signed(b, 64))),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integer_instruction(instruction: str) -> None:
    a, b, expected = INTEGERS[instruction]
    result = instruction.split()[1].rstrip(",")
    got = evaluate(instruction, a, b, result=result)
    mask = MASK64 if result.startswith("%rd") else MASK32
    assert [int(v) for v in got] == [expected(int(x), int(y)) & mask for x, y in zip(a, b, strict=True)]


def nearest(x: Fraction) -> float:
    return x.numerator / x.denominator


def test_double_fused_multiply_add() -> None:
    a, b = (RANDOM.normal(size=64) for _ in range(2))
    c = -(a * b) * (1 + RANDOM.integers(0, 3, 64) * 2.0**-50)  # what is left is what an unfused product rounds off
    got = evaluate("fma.rn.f64 %rd30, %rd21, %rd22, %rd23;", *(x.view(np.uint64) for x in (a, b, c)), result="%rd30")
    exact = [nearest(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got.view(np.float64), exact)


def test_float_arithmetic_is_rounded_once() -> None:
    a, b = (RANDOM.normal(size=64).astype(np.float32) for _ in range(2))
    c = (-a * b).astype(np.float32)
    got = evaluate("fma.rn.f32 %r30, %r21, %r22, %r23;", *(x.view(np.uint32) for x in (a, b, c)), result="%r30")
    exact = (a.astype(np.float64) * b + c.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.float32), exact)


@pytest.mark.parametrize(
    ("instruction", "x", "expected"),
    [
        ("max.f32 %r30, %r21, 0f3F800000;", np.nan, 1.0),
        ("max.NaN.f32 %r30, %r21, 0f3F800000;", np.nan, np.nan),
        ("min.f32 %r30, %r21, 0f3F800000;", -np.inf, -np.inf),
        ("ex2.approx.ftz.f32 %r30, %r21;", -np.inf, 0.0),
        ("ex2.approx.ftz.f32 %r30, %r21;", -126.5, 0.0),
        ("ex2.approx.f32 %r30, %r21;", -126.0, 2.0**-126),
        ("add.ftz.f32 %r30, %r21, 0f00000000;", 2.0**-130, 0.0),
        ("cvt.rn.bf16.f32 %h1, %r21; cvt.f32.bf16 %r30, %h1;", 1 + 2.0**-8, 1.0),
        ("cvt.rn.bf16.f32 %h1, %r21; cvt.f32.bf16 %r30, %h1;", 1 + 3 * 2.0**-8, 1 + 2.0**-6),
        ("cvt.rn.f16.f32 %h1, %r21; cvt.f32.f16 %r30, %h1;", 65520.0, np.inf),
        ("cvt.rni.f32.f32 %r30, %r21;", 2.5, 2.0),
        ("add.rm.f32 %r30, %r21, 0f4B400000;", 2.75, 12582914.0),
        ("add.rp.f32 %r30, %r21, 0f4B400000;", 2.25, 12582915.0),
        ("add.rz.f32 %r30, %r21, 0fCB400000;", 0.25, -12582911.0),
        ("cvt.rzi.s32.f32 %r31, %r21; cvt.rn.f32.s32 %r30, %r31;", -2.9, -2.0),
    ],
)
def test_special_values(instruction: str, x: float, expected: float) -> None:
    got = evaluate(instruction, np.full(64, x, np.float32).view(np.uint32), result="%r30").view(np.float32)
    np.testing.assert_array_equal(got, np.full(64, expected, np.float32))


# The last number packs the segment mask and the clamp: 31 for whole warps, 0x181f for segments of 8, and 0 for "up".
SHUFFLES = {
    "bfly.b32 %r30, %r21, 5, 31": lambda i: i ^ 5,
    "down.b32 %r30, %r21, 7, 31": lambda i: i + 7 if i + 7 < 32 else i,
    "up.b32 %r30, %r21, 3, 0": lambda i: i - 3 if i >= 3 else i,
    "idx.b32 %r30, %r21, 37, 31": lambda i: 5,
    "bfly.b32 %r30, %r21, 9, 0x181f": lambda i: (
        i ^ 9 if i ^ 9 < i else i
    ),  # an earlier segment may be read, a later not
    "down.b32 %r30, %r21, 5, 0x181f": lambda i: i + 5 if i % 8 < 3 else i,
    "idx.b32 %r30, %r21, 11, 0x181f": lambda i: i // 8 * 8 + 3,
}


@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffle(shuffle: str, schedule: str) -> None:
    got = evaluate(f"shfl.sync.{shuffle}, -1;", A32, result="%r30")
    source = [SHUFFLES[shuffle](i % 32) + i // 32 * 32 for i in range(64)]
    np.testing.assert_array_equal(got, A32[source])


# Every thread writes its word of shared memory and reads the word of thread (t ^ distance).
EXCHANGE = """
  mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
  {between}
  xor.b32 %r5, %r4, {distance}; ld.shared.u32 %r6, [%r5];
  add.s64 %rd12, %rd1, %rd10; st.global.u32 [%rd12], %r6;"""


@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
@pytest.mark.parametrize(
    ("between", "distance", "finding"),
    [
        ("bar.sync 0;", 128, None),
        ("", 128, "race"),  # another warp's word
        ("bar.warp.sync -1;", 128, "race"),
        ("bar.warp.sync -1;", 4, None),  # the word of a neighbour
        ("", 4, "race"),
        ("shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;", 4, "race"),  # orders nothing
        ("setp.eq.u32 %p1, %r1, 0; @%p1 exit; bar.sync 0;", 128, "barrier"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", 128, "barrier"),
        ("bar.sync 0; shfl.sync.bfly.b32 %r7, %r1, 1, 31, 0xffff;", 4, "lane"),
    ],
)
def test_barriers(between: str, distance: int, finding: str | None, schedule: str) -> None:
    findings = run(
        EXCHANGE.format(between=between, distance=distance), (np.zeros(64, np.uint32), False), schedule=schedule, seed=3
    )
    assert any(f.startswith(finding) for f in findings) if finding else findings == [], findings


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("add.s64 %rd12, %rd1, %rd10; ld.global.u32 %r6, [%rd12+4];", "out of bounds"),
        ("add.s64 %rd12, %rd1, %rd10; ld.global.u32 %r6, [%rd12+-4];", "out of bounds"),
        ("ld.global.v2.u32 {%r6, %r7}, [%rd1+4];", "misaligned"),
        ("ld.global.u32 %r6, [%rd2];", "uninitialised"),
        ("st.global.u32 [%rd2], %r1;", "race"),
        ("setp.eq.u32 %p1, %r1, 7; @%p1 st.global.u32 [%rd2], %r1;", "race"),  # by thread 7 of both blocks
        ("atom.global.add.u32 %r6, [%rd1], %r1;", None),
        ("atom.global.add.u32 %r6, [%rd1], %r1; ld.global.u32 %r6, [%rd1];", "race"),
        ("ld.global.u32 %r6, [%rd1]; setp.eq.u32 %p1, %r1, 63; @%p1 st.global.u32 [%rd1], %r1;", "race"),
        ("ld.shared.u32 %r6, [tile];", "uninitialised"),
        ("st.shared.u32 [tile+256], %r1;", "out of bounds"),
        ("A: bra A;", "hang"),
        ("{ .param .b64 a; st.param.b64 [a], %rd10; call.uni __assertfail, (a); }", "assertion failed"),
    ],
)
def test_memory_rules(body: str, finding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptxsim.Machine, "MAX_STEPS", 1000)
    buffers = (np.zeros(64, np.uint32), True), (np.zeros(64, np.uint32), False)
    findings = run(body, *buffers, blocks=2)
    assert any(f.startswith(finding) for f in findings) if finding else findings == [], findings


def test_atomics_add_up() -> None:
    total = np.zeros(1, np.uint32)
    assert run("red.global.add.u32 [%rd1], %r1;", (total, True), blocks=3, schedule="warps") == []
    assert total[0] == 3 * LANES.sum()


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ptxsim.PtxError):
        run("wmma.load.a.sync.aligned.m16n16k16.row.f16 %r6, [%rd1];", (np.zeros(64, np.uint32), True))
