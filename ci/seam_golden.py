# SPDX-License-Identifier: Apache-2.0
"""What each primitive of the seam must compile to: instruction, operands, their order.

A probe is a kernel of its own around one primitive. Its arguments carry names, its results go to
`out`, a pointer to 32-bit words; ci/check_seam.py writes the PTX of the kernel in these names:

    t0 = shfl.sync.down.b32 v, n, 31, -1      an instruction of the seam; t0, t1 ...: its results
    out[0] = t0                               a store
    [hw_dynamic_shared+4] = v                 shared(p): the shared address of generic pointer p

Instructions around them (comparisons, additions) stand nested in the operands: setp.gt.s32(a, b).
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What an architecture without the instruction does instead.
TRAP = ("trap",)


@dataclass(frozen=True)
class Probe:
    """A kernel around one primitive, and its PTX."""

    name: str  # of the primitive, or of the primitive and "_" and what is special
    arguments: str
    body: str
    expected: tuple[str, ...]
    before80: tuple[str, ...] | None = None  # on sm_75; None: the same, (): is not compared
    covers: tuple[str, ...] = field(default=())  # further functions that the body goes through


def _moved(instruction: str, operand: str, covers: tuple[str, ...] = ()) -> Probe:
    return Probe(
        instruction,
        f"unsigned v, int {operand}",
        f"out[0] = {instruction}(v, {operand});",
        (f"t0 = shfl.sync.{_SHUFFLES[instruction]} v, {operand}, {_BOUNDS[instruction]}, -1",
         "out[0] = t0"),
        covers=covers,
    )  # fmt: skip


_SHUFFLES = {
    "shuffle": "idx.b32", "shuffle_xor": "bfly.b32", "shuffle_up": "up.b32",
    "shuffle_down": "down.b32",
}  # fmt: skip
_BOUNDS = {"shuffle": 31, "shuffle_xor": 31, "shuffle_up": 0, "shuffle_down": 31}


def _special(name: str, register: str) -> Probe:
    return Probe(name, "", f"out[0] = {name}();", (f"out[0] = {register}",))


# tid + (tid < 0 ? 31 : 0), of a signed division by 32
_ROUNDED = "add.s32(%tid.x, shr.u32(shr.s32(%tid.x, 31), 27))"


def _fast(name: str, instruction: str) -> Probe:
    body = f"out[0] = __float_as_uint({name}(x));"
    return Probe(name, "float x", body, (f"t0 = {instruction} x", "out[0] = t0"))


def _copy(size: int, cache: str) -> Probe:
    return Probe(
        f"copy_async_{size}", "void* to, const void* from, int valid",
        f"copy_async_{size}(to, from, valid);",
        (f"cp.async.{cache}.shared.global [shared(to)], [from], {size}, valid",),
        before80=TRAP, covers=("shared_address",),
    )  # fmt: skip


def _wait(groups: int) -> Probe:
    return Probe(f"copy_async_wait_{groups}", "", f"copy_async_wait<{groups}>();",
                 (f"cp.async.wait_group {groups}",), before80=TRAP)  # fmt: skip


def _load(count: int, transposed: bool) -> Probe:
    name = f"load_matrix_x{count}" + ("_transposed" if transposed else "")
    trans = ".trans" if transposed else ""
    results = ", ".join(f"t{i}" for i in range(count))
    return Probe(
        name, "const void* row",
        f"uint32_t r[{count}]; {name}(r, row); for (int i = 0; i < {count}; ++i) out[i] = r[i];",
        (f"{{{results}}} = ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [shared(row)]",
         *(f"out[{i}] = t{i}" for i in range(count))),
        covers=("by",),
    )  # fmt: skip


def _detour(transposed: bool) -> Probe:
    """The row's address: first exclusive or, then the shift."""
    plain = _load(4, transposed)
    row = "[add.s32(4096, xor.b32(48, shared(row)))]"
    return Probe(
        plain.name + "_detour", plain.arguments, plain.body.replace("row)", "row, {48, 4096})"),
        (plain.expected[0].replace("[shared(row)]", row), *plain.expected[1:]),
    )  # fmt: skip


_MMA_ARGUMENTS = ", ".join(
    [f"float d{i}" for i in range(4)] + [f"unsigned a{i}" for i in range(4)] + ["unsigned b0",
     "unsigned b1"]
)  # fmt: skip


def _mma(call: str, name: str, shape: str, covers: tuple[str, ...] = ()) -> Probe:
    body = (
        "float d[4] = {d0, d1, d2, d3}; const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; "
        f"{call}(d, a, b); for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(d[i]);"
    )
    line = (
        f"{{t0, t1, t2, t3}} = mma.sync.aligned.{shape} "
        "{a0, a1, a2, a3}, {b0, b1}, {d0, d1, d2, d3}"
    )
    stores = tuple(f"out[{i}] = t{i}" for i in range(4))
    untouched = tuple(f"out[{i}] = d{i}" for i in range(4))
    return Probe(name, _MMA_ARGUMENTS, body, (line, *stores), (*TRAP, *untouched), covers)


def _pack(call: str, name: str, pair: str, covers: tuple[str, ...] = ()) -> Probe:
    body = f"out[0] = {call}(lo, hi);"
    lines = (f"t0 = cvt.rn.{pair}.f32 hi, lo", "out[0] = t0")
    return Probe(name, "float lo, float hi", body, lines, before80=(), covers=covers)


def _folded(name: str, call: str, combine: str, masks: tuple[int, ...], kind: str) -> Probe:
    """warp_sum and warp_max: v = combine(v, v of lane ^ mask) for falling masks."""
    body = f"out[0] = __float_as_uint({call}(v));"
    if kind != "float":
        body = f"out[0] = {call}(v);"
    lines, value, number = [], "v", 0
    for mask in masks:
        lines.append(f"t{number} = shfl.sync.bfly.b32 {value}, {mask}, 31, -1")
        first, second = sorted([value, f"t{number}"], key=lambda o: (not o.startswith("t"), o))
        lines.append(f"t{number + 1} = {combine} {first}, {second}")
        value, number = f"t{number + 1}", number + 2
    return Probe(name, f"{kind} v", body, (*lines, f"out[0] = {value}"))


PROBES = (
    # where am I
    _special("thread_index", "%tid.x"),
    *(_special(f"block_index_{axis}", f"%ctaid.{axis}") for axis in "xyz"),
    *(_special(f"grid_size_{axis}", f"%nctaid.{axis}") for axis in "xyz"),
    _special("lane", f"sub.s32(%tid.x, and.b32(-32, {_ROUNDED}))"),
    _special("warp", f"shr.s32({_ROUNDED}, 5)"),
    Probe("shared", "unsigned v", "shared<unsigned>()[1] = v;", ("[hw_dynamic_shared+4] = v",)),
    # barriers
    Probe("sync_block", "", "sync_block();", ("bar.sync 0",)),
    Probe("sync_warp", "", "sync_warp();", ("bar.warp.sync -1",)),
    Probe("sync_group", "int id, int threads", "sync_group(id, threads);",
          ("bar.sync id, threads",)),
    # exchange
    _moved("shuffle", "source", ("by_words",)),
    _moved("shuffle_xor", "mask"),
    _moved("shuffle_up", "n"),
    _moved("shuffle_down", "n"),
    Probe("shuffle_words", "unsigned long long v, int source",
          "const auto r = shuffle(v, source); out[0] = unsigned(r); out[1] = unsigned(r >> 32);",
          ("t0 = shfl.sync.idx.b32 lo(v), source, 31, -1",
           "t1 = shfl.sync.idx.b32 hi(v), source, 31, -1", "out[0] = t0", "out[1] = t1")),
    Probe("ballot", "int a, int b", "out[0] = dev::ballot(a > b);",
          ("t0 = vote.sync.ballot.b32 setp.gt.s32(a, b), -1", "out[0] = t0")),
    Probe("any", "int a, int b", "out[0] = dev::any(a > b);",
          ("t0 = vote.sync.any.pred setp.gt.s32(a, b), -1", "out[0] = selp.u32(1, 0, t0)")),
    Probe("all", "int a, int b", "out[0] = dev::all(a > b);",
          ("t0 = vote.sync.all.pred setp.gt.s32(a, b), -1", "out[0] = selp.u32(1, 0, t0)")),
    Probe("larger", "float a, float b", "out[0] = __float_as_uint(larger(a, b));",
          ("t0 = max.f32 a, b", "out[0] = t0")),
    Probe("larger_int", "int a, int b", "out[0] = larger(a, b);",
          ("t0 = max.s32 a, b", "out[0] = t0")),
    _folded("warp_sum", "warp_sum", "add.f32", (16, 8, 4, 2, 1), "float"),
    _folded("warp_sum_4", "warp_sum<4>", "add.f32", (2, 1), "float"),
    _folded("warp_max", "warp_max", "max.f32", (16, 8, 4, 2, 1), "float"),
    # atomics
    Probe("atomic_add", "unsigned* p, unsigned v", "out[0] = atomic_add(p, v);",
          ("t0 = atom.add.u32 [p], v", "out[0] = t0")),
    # fast maths
    _fast("exp2_fast", "ex2.approx.ftz.f32"),
    _fast("rcp_fast", "rcp.approx.ftz.f32"),
    _fast("rsqrt_fast", "rsqrt.approx.ftz.f32"),
    _fast("log2_fast", "lg2.approx.ftz.f32"),
    # packing and conversion
    _pack("pack_bf16", "pack_bf16", "bf16x2"),
    _pack("pack_f16", "pack_f16", "f16x2"),
    _pack("pack<bf16>", "pack_of_bf16", "bf16x2", ("pack",)),
    _pack("pack<f16>", "pack_of_f16", "f16x2", ("pack",)),
    Probe("to_bf16", "float x", "out[0] = bf16(x).bits;",
          ("t0 = cvt.rn.bf16.f32 x", "out[0] = cvt.u32.u16(t0)"), before80=()),
    Probe("to_f16", "float x", "out[0] = f16(x).bits;",
          ("t0 = cvt.rn.f16.f32 x", "out[0] = cvt.u32.u16(t0)")),
    Probe("to_tf32", "float x", "out[0] = to_tf32(x);",
          ("t0 = cvt.rna.tf32.f32 x", "out[0] = t0"), before80=("trap", "out[0] = 0")),
    # tensor cores
    _load(4, False),
    _load(4, True),
    _load(2, False),
    _load(2, True),
    _detour(False),
    _detour(True),
    _mma("mma_bf16", "mma_bf16", "m16n8k16.row.col.f32.bf16.bf16.f32"),
    _mma("mma_f16", "mma_f16", "m16n8k16.row.col.f32.f16.f16.f32"),
    _mma("mma_16x8x16<bf16>", "mma_16x8x16_bf16", "m16n8k16.row.col.f32.bf16.bf16.f32",
         ("mma_16x8x16",)),
    _mma("mma_16x8x16<f16>", "mma_16x8x16_f16", "m16n8k16.row.col.f32.f16.f16.f32",
         ("mma_16x8x16",)),
    _mma("mma_tf32", "mma_tf32", "m16n8k8.row.col.f32.tf32.tf32.f32"),
    # asynchronous copies
    _copy(16, "cg"),
    _copy(8, "ca"),
    _copy(4, "ca"),
    Probe("copy_async_commit", "", "copy_async_commit();", ("cp.async.commit_group",),
          before80=TRAP),
    *(_wait(groups) for groups in (0, 1, 3)),
    Probe("copy_async_wait", "", "copy_async_wait<2>();", ("cp.async.wait_group 2",),
          before80=TRAP),
)  # fmt: skip

# What launch.h asks of the CUDA runtime for the launches of ci/seam_launch.cu, word for word.
LAUNCHES = (
    "49152 bytes: no opt-in",
    "launch (7, 5, 3) x 96, 49152 bytes, stream 0x5",
    "49168 bytes: opt-in",
    "set attribute 8 to 49168",
    "launch (7, 5, 3) x 96, 49168 bytes, stream 0x5",
    "another device",
    "device 1",
    "launch (7, 5, 3) x 96, 1024 bytes, stream 0x5",
    "device 0",
    "no blocks: nothing",
)
