#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the device side of the seam compiles to; needs nvcc, no GPU.

Emulated tests run the other body of each primitive. Here every primitive of csrc/core/gpu/
(device.cuh, mma.cuh, async_copy.cuh) is compiled in a kernel of its own, and its PTX compared with
ci/seam_golden.py: instruction, operands, order. A primitive without a golden is a fault. Then the
host side of csrc/core/gpu/launch.h runs against a CUDA runtime that writes down what it is asked
for.

Usage: check_seam.py [--arch 75 80 90a] [--show NAME...]
       check_seam.py --self-test          faults planted into copies of the headers are found
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from seam_golden import LAUNCHES, PROBES, Probe

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ("device.cuh", "mma.cuh", "async_copy.cuh")
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr")

# Instructions that get a line of their own; all others stand nested in the operands.
OWN_LINE = re.compile(
    r"(shfl|vote|bar|barrier|ldmatrix|mma|cp|ex2|rcp|rsqrt|lg2|atom|max|min|trap|fence|membar|red|"
    r"mbarrier|wgmma|setmaxnreg|griddepcontrol|elect|st)\b|add\.f|cvt\.r"
)
SILENT = re.compile(r"(ld\.param|mov|cvta\.to\.global|cvt\.u64\.u64|ret)\b")
COMMUTATIVE = re.compile(r"(add|max|min|mul|and|or|xor)\b")


def nvcc() -> str | None:
    wheels = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", str(wheels)])
    )


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"check_seam: failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- From PTX to lines in the names of the arguments --------------------------------------------


class Lines:
    """The instructions of one kernel, with registers replaced by what is in them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names  # of the kernel's parameters
        self.value: dict[str, str] = {}  # of a register
        self.lines: list[str] = []
        self.results = 0

    def operand(self, text: str) -> str:
        text = text.strip()
        if text.startswith("{"):
            return "{" + ", ".join(self.operand(t) for t in text[1:-1].split(",")) + "}"
        if text.startswith("["):
            return self.address(text[1:-1])
        text = re.sub(r"_ZN\w*?hw_dynamic_sharedE?", "hw_dynamic_shared", text)
        return self.value.get(text, text)

    def address(self, text: str) -> str:
        parameter = re.fullmatch(r"\w+_param_(\d+)(\+4)?", text)
        if parameter:
            name = self.names[int(parameter[1])]
            return f"hi({name})" if parameter[2] else name
        base, plus, offset = text.partition("+")
        return f"[{self.operand(base)}{plus}{offset}]"

    def result(self) -> str:
        self.results += 1
        return f"t{self.results - 1}"

    def take(self, instruction: str) -> None:
        opcode, _, rest = instruction.partition(" ")
        operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        opcode = opcode.replace("atom.global", "atom")
        if opcode.startswith("st.global"):
            self.store(*operands)
        elif opcode.startswith("st.shared"):
            self.lines.append(f"{self.operand(operands[0])} = {self.operand(operands[1])}")
        elif opcode.startswith(("bar", "cp.async", "trap", "fence", "membar")):
            words = ", ".join(map(self.operand, operands))
            self.lines.append(f"{opcode} {words}".strip())
        elif opcode.startswith(("ld.param.v2", "mov.b64")) and operands[0].startswith("{"):
            low, high = operands[0][1:-1].split(",")
            whole = self.operand(operands[1])
            self.value[low.strip()], self.value[high.strip()] = f"lo({whole})", f"hi({whole})"
        elif operands:
            self.assign(opcode, operands[0], [self.operand(o) for o in operands[1:]])
        elif opcode != "ret":
            self.lines.append(opcode)

    def store(self, target: str, value: str) -> None:
        place = re.fullmatch(r"\[(.*?)(?:\+(\d+))?\]", target)
        assert place is not None, target
        index = int(place[2] or 0) // 4
        self.lines.append(f"{self.operand(place[1])}[{index}] = {self.operand(value)}")

    def assign(self, opcode: str, target: str, operands: list[str]) -> None:
        if COMMUTATIVE.match(opcode):
            operands = sorted(operands, key=lambda o: (not o.startswith("t"), o))
        words = ", ".join(operands)
        if opcode.startswith("cvta.to.shared"):
            self.value[target] = f"shared({words})"
        elif SILENT.match(opcode) or (opcode == "cvt.u32.u64" and words.startswith("shared")):
            self.value[target] = words
        elif OWN_LINE.match(opcode):
            registers = [r.strip() for r in target.strip("{}").split("|")[0].split(",")]
            for register in registers:
                self.value[register] = self.result()
            names = ", ".join(self.value[r] for r in registers)
            left = f"{{{names}}}" if target.startswith("{") else names
            self.lines.append(f"{left} = {opcode} {words}")
        else:
            self.value[target] = f"{opcode}({words})"


def instructions(body: str) -> list[str]:
    """One per instruction; asm blocks opened up, comments and declarations left out."""
    body = re.sub(r"//[^\n]*", "", body)
    found = []
    for part in re.split(r";|\n\s*[{}]\s*\n|\{\s*(?=\.reg)|(?<=;)\s*\}", body):
        text = " ".join(part.split()).removeprefix("} ").removeprefix("{ ")
        if text and text not in ("{", "}") and not text.startswith((".", "$")):
            found.append(text)
    return found


def kernels(ptx: str) -> dict[str, str]:
    """Name of the probe -> body."""
    found = re.findall(r"\.entry probe_(\w+)\([^{]*\)[^{]*\{\n(.*?)\n\}\n", ptx, re.S)
    return dict(found)


def lines_of(probe: Probe, body: str) -> list[str]:
    names = [re.split(r"[ *]", a)[-1] for a in probe.arguments.split(",") if a] + ["out"]
    lines = Lines(names)
    for instruction in instructions(body):
        lines.take(instruction)
    return lines.lines


# ---- The checks ----------------------------------------------------------------------------------


def source() -> str:
    lines = ['#include "core/gpu/mma.cuh"', "using namespace hw;", "using namespace hw::dev;"]
    for p in PROBES:
        arguments = ", ".join(filter(None, [p.arguments, "unsigned* out"]))
        lines.append(f'extern "C" __global__ void __launch_bounds__(1024) probe_{p.name}('
                     f"{arguments}) {{ {p.body} }}")  # fmt: skip
    return "\n".join(lines) + "\n"


def primitives(csrc: Path) -> list[str]:
    """The functions of the seam that device code may call."""
    text = "\n".join((csrc / "core/gpu" / header).read_text() for header in HEADERS)
    text = re.sub(r"//[^\n]*", "", text)
    return re.findall(r"HW_DEVICE\s(?:HW_INLINE\s)?[^;{}()]*?(\w+)\(", text)


def difference(name: str, expected: Sequence[str], words: str, lines: Sequence[str]) -> str:
    return "\n    ".join([f"{name}: expected", *expected]) + "\n    ".join([f"\n  {words}", *lines])


def check_complete(csrc: Path) -> list[str]:
    covered = {p.name for p in PROBES} | {name for p in PROBES for name in p.covers}
    return [f"{name}: no golden in ci/seam_golden.py"
            for name in dict.fromkeys(primitives(csrc)) if name not in covered]  # fmt: skip


def check_instructions(csrc: Path, arch: str, show: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file, ptx = Path(folder, "probes.cu"), Path(folder, "probes.ptx")
        file.write_text(source())
        run(nvcc() or "nvcc", *FLAGS, f"-I{csrc}", f"-arch=sm_{arch}", "-ptx", file, "-o", ptx)
        text = ptx.read_text()
    bodies, found = kernels(text), []
    for probe in PROBES:
        lines = lines_of(probe, bodies[probe.name])
        expected = list(probe.expected)
        if int(arch.rstrip("af")) < 80 and probe.before80 is not None:
            expected = list(probe.before80) or lines
        if probe.name in show:
            print(f"{probe.name} (sm_{arch})", *lines, sep="\n    ")
        if lines != expected:
            name = f"{probe.name} (sm_{arch})"
            found.append(difference(name, expected, "but the compiler made", lines))
    if ".align 128 .b8" not in text:
        found.append(f"shared (sm_{arch}): dynamic shared memory is not aligned to 128 bytes")
    return found


def check_launches(csrc: Path) -> list[str]:
    """Runs launch.h's own `launch` linked with ci/seam_runtime.cpp in place of the CUDA runtime."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "launches")
        here = Path(__file__).parent
        run(nvcc() or "nvcc", *FLAGS, f"-I{csrc}", "-arch=sm_80", "-cudart", "none",
            here / "seam_launch.cu", here / "seam_runtime.cpp", "-o", program)  # fmt: skip
        lines = run(program).splitlines()
    if lines == list(LAUNCHES):
        return []
    return [difference("launch", LAUNCHES, "but it asked the runtime", lines)]


def check(csrc: Path, archs: list[str], show: list[str]) -> list[str]:
    found = check_complete(csrc)
    for arch in archs:
        found += check_instructions(csrc, arch, show)
    return found + check_launches(csrc)


# ---- Self-test -----------------------------------------------------------------------------------

# header, text, what stands there instead, the probe that must notice
FAULTS = (
    ("device.cuh", '"=r"(word) : "f"(hi), "f"(lo)', '"=r"(word) : "f"(lo), "f"(hi)', "pack_bf16"),
    ("device.cuh", "__shfl_up_sync", "__shfl_down_sync", "shuffle_up"),
    ("device.cuh", "return __any_sync", "return __all_sync", "any"),
    ("device.cuh", "word[i] = move(word[i])", "word[i] = move(word[0])", "shuffle_words"),
    ("device.cuh", '"r"(id), "r"(threads)', '"r"(threads), "r"(id)', "sync_group"),
    ("device.cuh", "static_cast<int>(blockIdx.y)", "static_cast<int>(blockIdx.x)", "block_index_y"),
    ("mma.cuh", ".x4.trans.shared", ".x4.shared", "load_matrix_x4_transposed"),
    ("mma.cuh", ".f32.bf16.bf16.f32 \"", ".f32.f16.f16.f32 \"", "mma_bf16"),
    ("mma.cuh", '"r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#else\n  __trap();\n'
     "#endif\n}\n\n// The same", '"r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#else\n'
     "  __trap();\n#endif\n}\n\n// The same", "mma_f16"),
    ("async_copy.cuh", '"n"(N)', '"n"(N + 1)', "copy_async_wait"),
    ("async_copy.cuh", "[%1], 8, %2;", "[%1], 8;", "copy_async_8"),
    ("launch.h", "shared_bytes > kPlainSharedBytes", "shared_bytes > kMaxSharedBytes", "launch"),
)  # fmt: skip
UNKNOWN = "HW_DEVICE HW_INLINE int new_primitive() { return 0; }\n"


def planted(folder: Path) -> tuple[Path, list[str]]:
    """A copy of csrc/core with all faults, each in a primitive of its own; who must notice."""
    csrc, names = folder / "csrc", []
    shutil.copytree(ROOT / "csrc" / "core", csrc / "core")
    for header, sound, faulty, name in FAULTS:
        file = csrc / "core/gpu" / header
        text = file.read_text()
        if sound not in text:
            sys.exit(f"check_seam: {header} has no '{sound}' to plant a fault into")
        file.write_text(text.replace(sound, faulty, 1))
        names.append(name)
    file = csrc / "core/gpu/async_copy.cuh"
    file.write_text(file.read_text().replace("}  // namespace hw::dev", UNKNOWN + "}"))
    return csrc, [*names, "new_primitive"]


def self_test() -> int:
    with tempfile.TemporaryDirectory() as folder:
        csrc, names = planted(Path(folder))
        reports = check(csrc, ["80"], [])
    missed = 0
    for name in names:
        found = any(re.match(rf"{name}\b( \(|:)", report) for report in reports)
        missed += not found
        print(f"{'ok  ' if found else 'FAIL'} a fault planted into {name} is"
              f"{'' if found else ' not'} reported")  # fmt: skip
    return int(missed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["75", "80", "90a"])
    parser.add_argument("--show", nargs="+", default=[], help="print the PTX of these primitives")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if nvcc() is None:
        print("check_seam: there is no nvcc: the device side of the seam was NOT looked at")
        return 1
    if options.self_test:
        return self_test()
    found = check(ROOT / "csrc", options.arch, options.show)
    for fault in found:
        print(f"check_seam: {fault}")
    print(f"{len(PROBES)} probes of {len(set(primitives(ROOT / 'csrc')))} primitives for "
          f"{' '.join('sm_' + a for a in options.arch)}, {len(found)} faults")  # fmt: skip
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
