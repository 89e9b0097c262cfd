#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels; no GPU is needed.

For every kernel of a build and every architecture:

    spills, local memory    none
    registers               within the kernel's budget; without one, within 255
    shared memory           static, plus the dynamic plan of the kernel (its struct Smem), within
                            the budget
    blocks                  as many as the kernel plans for fit into a multiprocessor
    instructions            those that the kernel is written for are there: mma, ldmatrix, cp.async
    interior loop           instructions, and loads from shared memory, per product of tensor cores,
                            as sass.py counts them for sm_80, within the kernel's budget

Budgets stand in ptx_budgets.py.
and of the whole build, that a launch runs the code that was compiled with it: kernel entries are of
internal linkage (an unnamed namespace), and objects for more architectures are linked first.

The evidence is read from the object files with cuobjdump; a toolkit without it compiles the same
translation units again, by the build's compile_commands.json, to PTX and ptxas statistics.

Usage: check_ptx.py [--build-dir] DIR [--arch 80 90a] [--only TEXT] [--jobs N]
       check_ptx.py --self-test         kernels that must be found faulty are found faulty
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ptx_budgets import KIB, OPERATORS80, Budget, Work, budget_of, work_of
from sass import Loop, interior_loop

ROOT = Path(__file__).resolve().parent.parent
REGISTER_FILE = 65536  # registers of a multiprocessor
RESERVED = KIB  # of a block's shared memory, by the system; cuobjdump counts it from sm_90 on
SHARED_MEMORY = {"75": 64, "80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}

# What to look for, in PTX and in machine code.
INSTRUCTIONS = {
    "mma": re.compile(r"\bmma\.sync\.aligned\.m16n8k\d+|\bHMMA\.1688|\bHMMA\.16816"),
    "tf32": re.compile(r"\bmma\.sync\.aligned\.m16n8k8\S*tf32|\bHMMA\.1688\.F32\.TF32"),
    "ldmatrix": re.compile(r"\bldmatrix\.sync|\bLDSM\b"),
    "cp.async": re.compile(r"\bcp\.async\.c[ag]|\bLDGSTS\b"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture, as compiled."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    static_shared: int
    counts: dict[str, int] = field(default_factory=dict)
    dynamic_shared: int = 0
    loop: Loop | None = None  # where machine code could be read

    @property
    def shared(self) -> int:
        return self.static_shared + self.dynamic_shared


# ---- Judgement -----------------------------------------------------------------------------------


def loop_faults(kernel: Kernel, work: Work | None) -> list[str]:
    """What is wrong with a kernel's interior loop."""
    loop = kernel.loop
    if work is None or loop is None or kernel.arch != "80":
        return []
    found = []
    if loop.per_product > work.instructions:
        found.append(f"{loop.per_product:.2f} instructions a product, planned {work.instructions}")
    if loop.loads_per_product > work.loads:
        found.append(f"{loop.loads_per_product:.2f} shared loads a product, planned {work.loads}")
    if loop.inner > work.inner:
        found.append(f"{loop.inner} loops within the interior loop, planned {work.inner}")
    return found


def faults(kernel: Kernel, budget: Budget | None, work: Work | None = None) -> list[str]:
    """What is wrong with a kernel, in words."""
    found = loop_faults(kernel, work)
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes")
    if kernel.stack:
        found.append(f"uses {kernel.stack} bytes of local memory")
    if budget is None:
        return found
    if kernel.registers > budget.registers:
        found.append(f"uses {kernel.registers} registers, planned {budget.registers}")
    if kernel.shared > budget.shared:
        found.append(f"uses {kernel.shared} bytes of shared memory, planned {budget.shared}")
    fit = REGISTER_FILE // (-(-kernel.registers // 8) * 8 * budget.threads)
    if fit < budget.blocks:
        found.append(f"{fit} blocks fit by registers, planned {budget.blocks}")
    room = SHARED_MEMORY.get(re.sub(r"\D", "", kernel.arch), 100) * KIB
    if kernel.shared and room // (kernel.shared + RESERVED) < budget.blocks:
        found.append(f"{room // (kernel.shared + RESERVED)} blocks fit by shared memory")
    found += [f"has no {name}" for name in budget.needs if not kernel.counts.get(name)]
    return found


def _loop_columns(loop: Loop | None, work: Work | None) -> str:
    aims = [f"{aim:.1f}" for aim in work.aim] if work and work.aim else ["", ""]
    counts = [f"{loop.per_product:.2f}" + "+" * (loop.inner > 0)] if loop else [""]
    counts += [f"{loop.loads_per_product:.2f}"] if loop else [""]
    return f"{counts[0]:>8} {aims[0]:>4} {counts[1]:>8} {aims[1]:>4}"


def table(kernels: list[Kernel]) -> int:
    """Prints a line per kernel; returns the number of faulty ones."""
    print(f"{'kernel':<64} {'arch':>5} {'regs':>5} {'spill':>6} {'local':>6} {'shared':>7} "
          f"{'mma':>5} {'ldm':>5} {'cp':>4} {'ins/mma':>8} {'aim':>4} {'lds/mma':>8} {'aim':>4}"
          )  # fmt: skip
    faulty = 0
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        work = work_of(k.name)
        wrong = faults(k, budget_of(k.name), work)
        faulty += bool(wrong)
        name = k.name.replace("hw::", "").replace("softmax::", "")
        counts = [k.counts.get(i, 0) for i in ("mma", "ldmatrix", "cp.async")]
        print(f"{name:<64.64} {k.arch:>5} {k.registers:>5} {k.spills:>6} {k.stack:>6} "
              f"{k.shared:>7} {counts[0]:>5} {counts[1]:>5} {counts[2]:>4} "
              f"{_loop_columns(k.loop, work)}  "
              f"{'FAULT: ' + '; '.join(wrong) if wrong else ''}".rstrip())  # fmt: skip
    return faulty


# ---- Evidence ------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, beside nvcc, or from PyPI's wheels."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia/cu13")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", str(wheels)]
    nvcc = shutil.which("nvcc")
    if nvcc and name != "nvcc":
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        top = re.search(r"#\$ TOP=(\S+)", dry.stdout + dry.stderr)
        homes.insert(0, top[1] if top else "")
    path = os.pathsep.join([os.environ.get("PATH", ""), *(h + "/bin" for h in homes if h)])
    return shutil.which(name, path=path)


def demangle(names: list[str]) -> dict[str, str]:
    """The kernel struct of every mangled kernel_entry<...>; other names as they are."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                          check=True).stdout.splitlines()  # fmt: skip
    found = {}
    for mangled, plain in zip(names, text, strict=True):
        entry = re.search(r"kernel_entry<(.*?)>\s*\((?!.*\()", plain)
        found[mangled] = (entry[1].strip() if entry else plain).replace(">>", "> >")
    return found


def run(command: list[str]) -> str:
    # cuobjdump calls nvdisasm, which lies beside it
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    env = os.environ | {"PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"check_ptx: failed: {shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def count(code: str) -> dict[str, int]:
    return {name: len(pattern.findall(code)) for name, pattern in INSTRUCTIONS.items()}


def functions(listing: str, header: str) -> dict[str, str]:
    """Splits a listing into mangled name -> text of the function."""
    parts = re.split(header, listing, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def from_objects(cuobjdump: str, path: Path, archs: list[str]) -> list[Kernel]:
    kernels = []
    present = set(re.findall(r"sm_(\d+[af]?)\.cubin", run([cuobjdump, "-lelf", str(path)])))
    for arch in sorted(present & set(archs) if archs else present):
        select = ["-arch", f"sm_{arch}", str(path)]
        usage = functions(run([cuobjdump, "-res-usage", *select]), r"^\s*Function (\w+):$")
        code = functions(run([cuobjdump, "-sass", *select]), r"^\s*Function : (\w+)$")
        for name, text in usage.items():
            number = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", text)}
            body = code.get(name, "")
            spills = len(re.findall(r"\bSTL\b|\bLDL\b", body)) * 4
            reserved = RESERVED if int(arch.rstrip("af")) >= 90 else 0
            static = max(0, number.get("SHARED", 0) - reserved)
            kernels.append(Kernel(name, arch, number["REG"], number.get("STACK", 0), spills, static,
                                  count(body), loop=interior_loop(body)))  # fmt: skip
    return kernels


STATISTICS = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_\w+'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.S,
)


def from_source(command: list[str], arch: str) -> list[Kernel]:
    """Compiles one translation unit for one architecture; `command`: nvcc, flags, source."""
    with tempfile.TemporaryDirectory() as folder:
        output = run([*command, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", "-keep",
                      "-keep-dir", folder, "-o", folder + "/out.cubin"])  # fmt: skip
        ptx = "\n".join(p.read_text() for p in Path(folder).glob("*.ptx"))
    code = functions(ptx, r"^\s*(?:\.visible|\.weak)?\s*\.entry (\w+)\(")
    kernels = []
    for name, stack, stores, loads, registers, rest in STATISTICS.findall(output):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills, static = int(stores) + int(loads), int(shared[1]) if shared else 0
        counts = count(code.get(name, ""))
        kernels.append(Kernel(name, arch, int(registers), int(stack), spills, static, counts))
    return kernels


def units(build: Path) -> list[tuple[list[str], list[str]]]:
    """(nvcc, flags and source; architectures) of every CUDA translation unit of a build."""
    listing = build / "compile_commands.json"
    found = []
    for entry in json.loads(listing.read_text()) if listing.exists() else []:
        if not entry["file"].endswith(".cu"):
            continue
        words = shlex.split(entry["command"])
        start = next(i for i, w in enumerate(words) if Path(w).name == "nvcc")
        text, kept, skip = " ".join(words), [words[start]], False
        for word in words[start + 1 :]:
            if skip:
                skip = False
            elif word in {"-o", "-x", "-MF", "-MT", "-gencode", "--generate-code", "-arch"}:
                skip = True
            elif not re.match(r"--generate-code=|-gencode=|-arch=|-MD$|-MMD$|-c$|-Xfatbin", word):
                kept.append(word)
        archs = re.findall(r"\bsm_(\d+[af]?)", text)
        found.append((kept, sorted(set(archs))))
    return found


def collect(build: Path, archs: list[str], only: str, jobs: int) -> list[Kernel]:
    cuobjdump = tool("cuobjdump")
    objects = [p for p in sorted(build.rglob("*.cu.o")) if only in str(p)]
    work: list[Callable[[], list[Kernel]]] = []
    if cuobjdump and objects:
        work = [partial(from_objects, cuobjdump, p, archs) for p in objects]
    else:
        work = [
            partial(from_source, command, arch)
            for command, built in units(build)
            for arch in (archs or built)
            if only in command[-1] and ("_simt_" in command[-1] or int(arch.rstrip("af")) >= 80)
        ]
    with ThreadPoolExecutor(jobs) as pool:
        return [kernel for kernels in pool.map(lambda job: job(), work) for kernel in kernels]


def dynamic_shared(names: set[str]) -> dict[str, int]:
    """sizeof(Kernel::Smem) of the kernels that have a plan, by the host compiler."""
    planned = sorted(n for n in names if (b := budget_of(n)) and b.shared)
    if not planned:
        return {}
    lines = [f'#include "ops/{op}/{op}_sm80.cuh"' for op in OPERATORS80]
    lines += ["#include <cstdio>"]
    lines += ["int main() {"]
    lines += [f'  std::printf("%zu\\n", sizeof({name}::Smem));' for name in planned]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "sizes.cpp"), Path(folder, "sizes")
        source.write_text("\n".join([*lines, "}"]))
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        run([*compiler, "-std=c++20", "-DHW_EMULATE", f"-I{ROOT / 'csrc'}", str(source), "-o",
             str(program)])  # fmt: skip
        return dict(zip(planned, map(int, run([str(program)]).split()), strict=True))


def named(kernels: list[Kernel]) -> list[Kernel]:
    """With readable names and shared memory plans; a kernel of several objects once."""
    names = demangle([k.name for k in kernels])
    sizes = dynamic_shared(set(names.values()))
    found = {}
    for k in kernels:
        name = names[k.name]
        found[name, k.arch] = replace(k, name=name, dynamic_shared=sizes.get(name, 0))
    return list(found.values())


def link_faults(build: Path) -> list[str]:
    """What would make a launch run another unit's code, which may be for other architectures."""
    found = []
    for path in sorted(build.rglob("*.cu.o")):
        for name in re.findall(r" [tTWV] (_ZN2hwL?12kernel_entry\w*)", run(["nm", str(path)])):
            found.append(f"{path.name}: {name} is not in an unnamed namespace")
    ninja = build / "build.ninja"
    link = ninja.exists() and re.search(
        r"^build lib/libheadworks\.so: \S+ (.*?)(\||$)", ninja.read_text(), re.M
    )
    backends = re.findall(r"hw_cuda_(\w+)\.dir", link[1]) if link else []
    if backends != sorted(backends, key=["SIMT", "SM80", "SM90"].index):
        found.append("objects for fewer architectures are linked before those for more")
    return found


# ---- Self-test -----------------------------------------------------------------------------------

FAULTY = """
#include <cuda_runtime.h>
__global__ void __launch_bounds__(1024, 1) spilling(float* x, int n) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = x[i * n];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i + 1) % 96] + x[k];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * n] = a[i];
}
__global__ void local(float* x, int n) {
  float a[64];
  for (int i = 0; i < n; ++i) a[(i * 7 + n) % 64] = x[i];
  for (int i = 0; i < n; ++i) x[i] = a[(i * 5 + n) % 64];
}
namespace hw {
template <class T>
__global__ void kernel_entry(T* x) { *x = 1; }
template __global__ void kernel_entry<float>(float*);
}
__global__ void plain(float* x) {
  __shared__ float s[2048];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}
__device__ void multiply(float (&d)[4], const unsigned* s) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(s[0]), "r"(s[32]));
#endif
}
__global__ void products(float* x, int n) {
  __shared__ unsigned s[4096];
  for (int i = threadIdx.x; i < 4096; i += blockDim.x) s[i] = i;
  __syncthreads();
  float d[4] = {};
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    multiply(d, s + k * 64 + threadIdx.x);
    if (x[k] < 0) {  // the slow way: not counted
#pragma unroll
      for (int i = 0; i < 64; ++i) d[i % 4] = d[i % 4] * x[i] + s[i];
    }
  }
  x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
__global__ void wasteful(float* x, int n) {
  __shared__ unsigned s[4096];
  for (int i = threadIdx.x; i < 4096; i += blockDim.x) s[i] = i;
  __syncthreads();
  float d[4] = {};
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    multiply(d, s + k * 64 + threadIdx.x);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = d[i] * x[i] + s[(n + i * 4) % 4096];
#pragma unroll 1
    for (int i = 0; i < n; ++i) d[0] += x[i * k];
  }
  x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def self_test() -> int:
    """Every fault that is promised above, planted and found; a sound kernel passes."""
    nvcc = tool("nvcc")
    if not nvcc:
        print("check_ptx: SKIPPED the self-test, there is no nvcc")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "faulty.cu"), Path(folder, "faulty.cu.o")
        source.write_text(FAULTY)
        found = from_source([nvcc, "-std=c++17", str(source)], "80")
        cuobjdump, in_object = tool("cuobjdump"), []
        if cuobjdump:
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
            run([nvcc, "-std=c++17", *codes, "-c", str(source), "-o", str(made)])
            in_object = named(from_objects(cuobjdump, made, []))
        linked = link_faults(Path(folder))
    compiled = {re.sub(r"\(.*", "", k.name): k for k in named(found)}
    compiled |= {re.sub(r"\(.*", "", k.name) + "_" + k.arch: k for k in in_object}
    roomy = Work("products", 24, 2)
    sound = Budget("plain", 64, 256, 2, 8 * KIB)
    expected = [
        ("spilling", None, "spills"),
        ("local", None, "local memory"),
        ("plain", sound, ""),
        ("plain", replace(sound, registers=1), "registers, planned"),
        ("plain", replace(sound, shared=KIB), "bytes of shared memory, planned"),
        ("plain", replace(sound, blocks=99), "blocks fit"),
        ("plain", replace(sound, needs=("mma",)), "has no mma"),
    ]
    if in_object:  # where the system's share is not the kernel's
        expected += [
            ("plain_90a", sound, ""),
            ("plain_90a", replace(sound, shared=KIB), "bytes of shared memory, planned"),
            ("spilling_90a", None, "spills"),
            ("<linked>", None, "is not in an unnamed namespace"),
            ("products_80", roomy, ""),
            ("products_80", replace(roomy, instructions=1), "instructions a product, planned"),
            ("products_80", replace(roomy, loads=1), "2.00 shared loads a product, planned"),
            ("wasteful_80", roomy, "instructions a product, planned"),
            ("wasteful_80", roomy, "3.00 shared loads a product, planned"),
            ("wasteful_80", roomy, "1 loops within the interior loop, planned 0"),
            ("wasteful_90a", roomy, ""),
        ]
    wrong = 0

    def judge(kernel: Kernel, plan: Budget | Work | None) -> list[str]:
        return loop_faults(kernel, plan) if isinstance(plan, Work) else faults(kernel, plan)

    for name, budget, words in expected:
        text = "; ".join(linked if name == "<linked>" else judge(compiled[name], budget))
        right = words in text if words else not text
        wrong += not right
        verdict = "ok  " if right else "FAIL"
        print(f"{verdict} {name}: expected '{words or 'no fault'}', got '{text}'")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", nargs="?", type=Path, help="a CMake build folder")
    parser.add_argument("--build-dir", type=Path)
    parser.add_argument("--arch", nargs="+", default=[], help="default: those of the build")
    parser.add_argument("--only", default="", help="only translation units whose name has this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    build = options.build_dir or options.build
    if build is None or not build.is_dir():
        parser.error(f"no build folder: {build}")
    kernels = named(collect(build, options.arch, options.only, options.jobs))
    if not kernels:
        print(f"check_ptx: {build} has no CUDA kernels; was it built with FORCE_CUDA=1?")
        return 1
    faulty = table(kernels)
    linked = link_faults(build)
    for fault in linked[:10]:
        print(f"check_ptx: {fault}")
    print(f"{len(kernels)} kernels, {faulty} faulty; {len(linked)} faults of linkage")
    return int(faulty > 0 or bool(linked))


if __name__ == "__main__":
    sys.exit(main())
