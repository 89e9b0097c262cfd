# SPDX-License-Identifier: Apache-2.0
"""The build: choices that CMake and setup.py make, their errors, and what the libraries export."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from headworks import _library

ROOT = Path(__file__).parents[1]

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")),
    reason="cmake and ninja are not on PATH",
)
BUILD_VARIABLES = (
    "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST",
    "CMAKE_CUDA_ARCHITECTURES", "HEADWORKS_PRESET", "MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL",
)  # fmt: skip


def cmake(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run cmake with only these of the build's variables set."""
    env = {k: v for k, v in os.environ.items() if k not in BUILD_VARIABLES} | variables
    return subprocess.run(
        ["cmake", *map(str, arguments)], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False,
    )  # fmt: skip


def configure(folder: Path, preset: str = "auto", *options: str, **variables: str):
    return cmake(
        "--preset", preset, "-B", folder, f"-DHW_PYTHON_EXECUTABLE={sys.executable}", *options,
        **variables,
    )  # fmt: skip


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---- architectures -------------------------------------------------------------------------------


KNOWN = "75;80;86;87;88;89;90;100;103;110;120;121"  # of nvcc 13.0
KNOWN_TO_12_4 = "50;52;60;61;70;75;80;86;87;89;90"


def run_cmake(tmp_path: Path, *lines: str, path: str = "", **variables: str) -> str:
    """The output of a script of CMake, in one line; `path`: a folder before PATH."""
    script = tmp_path / "script.cmake"
    script.write_text("\n".join([f"include({ROOT}/cmake/HeadworksCudaChoice.cmake)", *lines]))
    if path:
        variables["PATH"] = path + os.pathsep + os.environ["PATH"]
    return one_line(cmake("-P", script, **variables).stdout)


def archs(tmp_path: Path, gpus: str = "", known: str = KNOWN, **variables: str) -> str:
    """What HeadworksArchitectures.cmake chooses: "simt | sm80", or its error."""
    return run_cmake(
        tmp_path,
        f'hw_choose_archs("{gpus}" "{known}")',
        'message("${HW_CUDA_ARCHS_SIMT} | ${HW_CUDA_ARCHS_SM80}")',
        **variables,
    )


@needs_cmake
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX"}, "80-real;90a | 80-real;90a"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.6+PTX"}, "75-real;86 | 86"),
        ({"TORCH_CUDA_ARCH_LIST": "12.0"}, "120-real | 120-real"),
        ({"TORCH_CUDA_ARCH_LIST": " 8.0 "}, "80-real | 80-real"),
        ({"CMAKE_CUDA_ARCHITECTURES": "80;90-virtual"}, "80;90-virtual | 80;90-virtual"),
        ({"CMAKE_CUDA_ARCHITECTURES": "75"}, "75 |"),
    ],
)  # fmt: skip
def test_architectures_that_the_user_names(tmp_path, variables, expected):
    assert archs(tmp_path, gpus="89", **variables) == expected


@needs_cmake
@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        ("90", KNOWN, "90a-real"),
        ("86", KNOWN, "86-real"),
        ("75", KNOWN, "75-real"),
        ("100", KNOWN, "100-real"),
        ("86;90", KNOWN, "86-real;90a-real"),
        ("61;86", KNOWN, "86-real"),  # the older one is not served
        ("100", KNOWN_TO_12_4, "90-virtual"),
        ("103", "90;100", "100-real"),
        ("103;100", "90;100", "100-real"),
        ("130", KNOWN, "121-virtual"),
    ],
)
def test_architectures_of_the_gpus_of_this_machine(tmp_path, gpus, known, expected):
    assert archs(tmp_path, gpus, known).split(" |")[0] == expected


@needs_cmake
@pytest.mark.parametrize("gpus", ["", "unknown"])
def test_architectures_for_any_machine(tmp_path, gpus):
    """Code of its own for each generation that nvcc knows, and PTX of the newest."""
    sm80 = "80-real;90a-real;100-real;120-real;120-virtual"
    assert archs(tmp_path, gpus) == f"75-real;{sm80} | {sm80}"
    sm80 = "80-real;90a-real;90-virtual"
    assert archs(tmp_path, gpus, KNOWN_TO_12_4) == f"75-real;{sm80} | {sm80}"


@needs_cmake
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "cannot read 'Hopper' in '8.0;Hopper'"),
        ({"CMAKE_CUDA_ARCHITECTURES": "native"}, "cannot read 'native'"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.9"}, "nvcc does not know sm_99 of '80-real;99-real'; it"),
        ({"TORCH_CUDA_ARCH_LIST": "6.1"}, "none from sm_75 on"),
    ],
)
def test_architectures_that_cannot_be_read(tmp_path, variables, expected):
    assert expected in archs(tmp_path, **variables)


# ---- CUDA or not ---------------------------------------------------------------------------------


def program(folder: Path, name: str, body: str) -> Path:
    """A program that stands for one of NVIDIA's."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def machine(tmp_path: Path, *, smi: str | None, nvcc: str | None, files: tuple[str, ...] = ()):
    """The start of a script that sees only these: what nvidia-smi prints, nvcc's version."""
    folder, root = tmp_path / "programs", tmp_path / "root"
    program(folder, "nvidia-smi", "exit 9" if smi is None else f"printf '{smi}'")
    cxx = folder / "nvcc"
    if nvcc is not None:
        listing = "printf 'compute_80\\ncompute_90\\ncompute_120\\ncompute_100\\n'"
        version = f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'"
        program(folder, "nvcc", f"[ $1 = --list-gpu-arch ] && {listing} || {version}")
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return [f'set(HW_SYSTEM_ROOT "{root}")'], {"path": str(folder), "CUDACXX": str(cxx)}


def decision(tmp_path: Path, wanted: str = "AUTO", *, variables=(), **of_machine) -> str:
    """ "<FOUND> <architectures of simt> <reason>" after what was printed on the way."""
    lines, environment = machine(tmp_path, **of_machine)
    lines += [
        f"set(HW_CUDA {wanted})",
        "set(HW_PRESET auto)",
        "hw_decide_cuda()",
        'message("=> ${HW_CUDA_FOUND} ${HW_CUDA_ARCHS_SIMT} ${HW_CUDA_REASON}")',
    ]
    return run_cmake(tmp_path, *lines, **(environment | dict(variables)))


H100 = "9.0, 580.65.06\\n9.0, 580.65.06\\n"


@needs_cmake
def test_a_visible_gpu_is_built_for(tmp_path):
    assert decision(tmp_path, smi=H100, nvcc="13.0") == "=> TRUE 90a-real"
    assert decision(tmp_path, "ON", smi=H100, nvcc="13.0") == "=> TRUE 90a-real"


@needs_cmake
def test_nvcc_without_a_gpu_builds_for_the_cpu_and_says_how_to_get_cuda(tmp_path):
    told = decision(tmp_path, smi=None, nvcc="13.0")
    assert told.startswith("=> FALSE no GPU was visible at build time")
    assert "FORCE_CUDA=1" in told
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in told
    assert decision(tmp_path, smi="No devices were found\\n", nvcc="13.0") == told


@needs_cmake
def test_a_list_of_architectures_or_force_cuda_asks_for_cuda(tmp_path):
    one = {"TORCH_CUDA_ARCH_LIST": "8.0"}
    assert decision(tmp_path, smi=None, nvcc="13.0", variables=one) == "=> TRUE 80-real"
    forced = decision(tmp_path, smi=None, nvcc="13.0", variables={"FORCE_CUDA": "1"})
    assert forced == "=> TRUE 80-real;90a-real;100-real;120-real;120-virtual"
    none = {"FORCE_CUDA": "0"} | one
    assert "=> FALSE it was built with FORCE_CUDA=0" in decision(
        tmp_path, smi=H100, nvcc="13.0", variables=none
    )


@needs_cmake
@pytest.mark.parametrize("file", ["dev/nvidia0", "proc/driver/nvidia/gpus/0000:01:00.0"])
def test_a_gpu_that_nvidia_smi_cannot_name_gets_code_for_all(tmp_path, file):
    told = decision(tmp_path, smi=None, nvcc="13.0", files=(file,))
    assert told == "=> TRUE 80-real;90a-real;100-real;120-real;120-virtual"


@needs_cmake
@pytest.mark.parametrize(
    ("smi", "nvcc", "reason"),
    [
        (H100, None, "the nvcc that CUDACXX named at build time was not there"),
        (H100, "12.0", "nvcc 12.0 at build time is older than the needed 12.4"),
        ("6.1, 580.1\\n", "13.0", "the GPU at build time, sm_61, is older than sm_75"),
    ],
)
def test_what_stands_in_the_way_of_cuda_is_said(tmp_path, smi, nvcc, reason):
    assert f"=> FALSE {reason}" in decision(tmp_path, smi=smi, nvcc=nvcc)


@needs_cmake
def test_a_driver_that_is_too_old_is_warned_of(tmp_path):
    old = "9.0, 570.12\\n"
    assert "the driver is 570; what CUDA 13.0 compiles needs 580 or later" in decision(
        tmp_path, smi=old, nvcc="13.0"
    )
    assert decision(tmp_path, smi=old, nvcc="12.8") == "=> TRUE 90a-real"


@needs_cmake
def test_configuring_with_nvcc_and_no_gpu_carries_the_reason(tmp_path):
    """Into the configure's output and into the library, for `headworks info` and for errors."""
    _, environment = machine(tmp_path, smi=None, nvcc="13.0")
    path = environment["path"] + os.pathsep + os.environ["PATH"]
    result = configure(
        tmp_path / "build", "auto", f"-DHW_SYSTEM_ROOT={tmp_path}",
        PATH=path, CUDACXX=environment["CUDACXX"],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "headworks: " in line]
    assert "headworks: CPU only, because no GPU was visible at build time" in line
    config = (tmp_path / "build" / "generated" / "build_config.h").read_text()
    assert "install with FORCE_CUDA=1" in config


# ---- configuring ---------------------------------------------------------------------------------


@needs_cmake
def test_a_missing_compiler_is_one_clear_message(tmp_path):
    result = configure(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("headworks: ")]
    assert line.startswith("headworks: no C++20 compiler (looked for: no-such-compiler)")
    assert "apt install g++" in line
    assert "CMAKE_CXX_COMPILER" not in result.stdout


@needs_cmake
def test_forced_cuda_without_nvcc_is_an_error(tmp_path):
    result = configure(tmp_path, "auto", FORCE_CUDA="1", CUDACXX="/nowhere/nvcc")
    assert result.returncode != 0
    assert "CUDA was asked for (FORCE_CUDA=1" in one_line(result.stdout)
    assert "set FORCE_CUDA=0" in one_line(result.stdout)


@needs_cmake
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CUDACXX": "/nowhere/nvcc"}, "the nvcc that CUDACXX named at build time was not there"),
        ({"FORCE_CUDA": "0"}, "it was built with FORCE_CUDA=0"),
    ],
)
def test_without_nvcc_it_says_so_and_builds_for_the_cpu(tmp_path, variables, reason):
    result = configure(tmp_path, "auto", **variables)
    assert result.returncode == 0, result.stdout
    assert f"headworks: CPU only, because {reason}" in result.stdout
    assert not list((tmp_path / "generated").glob("*.cu"))
    assert reason in (tmp_path / "generated" / "build_config.h").read_text()


@needs_cmake
def test_force_cuda_takes_only_0_and_1(tmp_path):
    assert "FORCE_CUDA is 'yes'" in configure(tmp_path, FORCE_CUDA="yes").stdout


@needs_cmake
def test_configuring_again_rewrites_nothing(tmp_path):
    def written() -> dict[str, int]:
        files = (tmp_path / "generated").iterdir()
        return {f.name: f.stat().st_mtime_ns for f in files}

    assert configure(tmp_path, "emu").returncode == 0
    first = written()
    assert configure(tmp_path, "emu").returncode == 0
    assert written() == first
    # Translation units: (operator, instruction set), (operator, backend, dtype, dim).
    for name in (
        "linear_attention_cpu_",
        "linear_attention_sm80_bf16_64",
        "key_scan_simt_f64_0",
    ):
        assert any(file.startswith(name) for file in first), name


@needs_cmake
def test_a_declared_file_must_exist(tmp_path):
    script = tmp_path / "missing.cmake"
    script.write_text(
        f"set(CMAKE_CURRENT_SOURCE_DIR {ROOT})\nset(HW_ISAS baseline)\n"
        f"include({ROOT}/cmake/HeadworksOperators.cmake)\n"
        "hw_add_operator(no_such_operator FUNCTIONS forward CPU f32)\n"
    )
    result = cmake("-P", script)
    assert result.returncode != 0
    assert "no_such_operator.cpp is declared in CMakeLists.txt, but" in one_line(result.stdout)


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch):
    """The module setup.py without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("headworks_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("memory", "jobs"), [(100.0, 16), (6.0, 8), (2.6, 1), (0.5, 1), (None, 16)]
)
def test_jobs_follow_free_memory(setup_py, monkeypatch, capsys, memory, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(setup_py, "free_memory_gb", lambda: memory)
    assert setup_py.chosen_jobs() == jobs
    assert f"headworks: {jobs} build jobs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"])
def test_jobs_from_the_environment(setup_py, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "3")
    assert setup_py.chosen_jobs() == 3
    assert f"headworks: 3 build jobs ({name})" in capsys.readouterr().err
    monkeypatch.setenv(name, "many")
    with pytest.raises(SystemExit, match=f"{name} is 'many'"):
        setup_py.chosen_jobs()


def test_an_unknown_preset_is_refused(setup_py, monkeypatch):
    assert setup_py.chosen_preset() == "auto"
    monkeypatch.setenv("HEADWORKS_PRESET", "gpu")
    with pytest.raises(SystemExit, match="HEADWORKS_PRESET is 'gpu'; expected one of auto, cpu"):
        setup_py.chosen_preset()


def test_libraries_of_an_earlier_preset_are_removed(setup_py, monkeypatch, tmp_path):
    stale = tmp_path / "headworks" / "libheadworks_emulator.so"
    stale.parent.mkdir()
    stale.touch()
    commands = []
    command = setup_py.CMakeBuild(setuptools.Distribution())
    monkeypatch.setattr(command, "cmake", lambda *arguments: commands.append(arguments[0]))
    command.build_lib, command.inplace = str(tmp_path), False
    command.run()
    assert commands == ["--preset", "--build", "--install"]
    assert not stale.exists()


def test_build_requirements_are_four_and_torch_is_not_among_them():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    names = [re.match(r'\s*"([a-z0-9]+)', item).group(1) for item in listed.group(1).split(",")]
    assert names == ["setuptools", "cmake", "ninja", "pybind11"]
    for folder in ("csrc", "cmake"):
        for file in (ROOT / folder).rglob("*.*"):
            assert not re.search(r"#include\s*<(torch|ATen|c10)/", file.read_text()), file


# ---- the built libraries -------------------------------------------------------------------------

LIBRARIES = [*_library._folder().glob("libheadworks*.so"), *_library._folder().glob("_C*.so")]


def output(*command: str | Path) -> str:
    if not shutil.which(str(command[0])):
        pytest.skip(f"{command[0]} is not on PATH")
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_libraries_export_one_symbol(library):
    symbols = {
        line.split()[-1] for line in output("nm", "-D", "--defined-only", library).splitlines()
    }
    assert symbols == {"PyInit__C" if library.name.startswith("_C") else "hw_api"}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_libraries_need_neither_torch_nor_the_driver(library):
    text = output("readelf", "-d", library)
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert not [n for n in needed if re.match(r"lib(torch|c10|cuda|cudart|python)", n)], needed
    if library.name.startswith("_C"):
        assert "libheadworks.so" in needed
        assert "$ORIGIN" in text


ISAS = ("baseline", "avx2", "avx512", "avx512bf16")  # of x86, weakest first


def isa_of(name: str) -> str:
    """The instruction set that an object was compiled for, from its name."""
    isa = re.search(r"_(avx[a-z0-9]+)\.cpp\.o$", name)
    return isa.group(1) if isa else "baseline"


def isa_objects() -> dict[str, list[Path]]:
    """The objects that libheadworks was linked from, by instruction set, where they still are."""
    preset = _library.info()["preset"]
    folders = [_library._folder().parent, ROOT / "build" / f"pip-{preset}"]
    for folder in folders:
        objects = sorted((folder / "CMakeFiles" / "hw_native.dir").rglob("*.o"))
        if objects:
            result: dict[str, list[Path]] = {isa: [] for isa in ISAS}
            for file in objects:
                result[isa_of(file.name)].append(file)
            return result
    pytest.skip("the object files are not there (not an editable or a CMake build)")


def shared_functions(objects: list[Path]) -> set[str]:
    """Functions that the linker may take from any object that defines them."""
    lines = output("nm", "--defined-only", *objects).splitlines()
    return {line.split()[-1] for line in lines if " W " in line}


def test_no_function_of_a_wide_instruction_set_serves_the_others():
    """The linker keeps the first of several equal functions: it must be the one for every machine.

    Functions that only wide objects share are harmless as long as no other object refers to them,
    which holds because an object that refers to such a function also defines it.
    """
    objects = isa_objects()
    if not objects["avx2"]:
        pytest.skip("one instruction set only")
    own = {isa: shared_functions(files) for isa, files in objects.items() if files}
    # Ours must be inlined or of internal linkage; see core/cpu/simd.h.
    ours = {name for isa in ISAS[1:] for name in own.get(isa, ()) if "2hw" in name}
    assert not ours & own["baseline"], f"also in baseline objects: {sorted(ours & own['baseline'])}"
    build = objects["baseline"][0]
    while not (build / "build.ninja").exists():
        build = build.parent
    link = re.search(
        r"^build lib/libheadworks\.so: \S+ (.*?)(\||$)", (build / "build.ninja").read_text(), re.M
    )
    order = [ISAS.index(isa_of(o)) for o in link.group(1).split() if ".cu.o" not in o]
    assert order == sorted(order), "objects must be linked from the weakest to the widest"
