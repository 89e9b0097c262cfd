# SPDX-License-Identifier: Apache-2.0
"""The native boundary: how tensors are read, dispatch and its reasons, loading, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import headworks as hw
from headworks import _library

native = _library.native
FORWARD = _library.function("key_scan.forward")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.uint8]  # fmt: skip


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.use_exchange_api(True)
    _library.set_cpu_isa(None)


def key_scan_tensors(dtype=torch.float32, batch=2, tokens=5, heads=3, dim=4):
    """s v o0 lse0 o lse o1 lse1 o_wide, and the expected o."""
    s = torch.randn(batch, tokens, heads, dtype=dtype)
    v = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    o = torch.full_like(v, float("nan"))
    lse = torch.full((batch, tokens, heads), float("nan"), dtype=statistics)
    weights = s.double().exp()[..., None]
    expected = (weights * v.double()).cumsum(1) / weights.cumsum(1)
    return [s, v, None, None, o, lse, None, None, None], expected


O = 4  # where o is


# ---- reading tensors -----------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def described(x, exchange: bool):
    native.use_exchange_api(exchange)
    return native.describe(x)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_gives_pointer_sizes_strides_and_dtype(exchange, dtype):
    base = torch.zeros(3, 4, 5, 6, dtype=dtype)
    for x in (
        base, base.transpose(1, 3), base[1:, ::2, :, 3], base[:, :, :0], base[0, 0, 0, 0],
        torch.zeros(1, dtype=dtype).expand(2, 7), torch.zeros(0, dtype=dtype),
    ):  # fmt: skip
        data, sizes, strides, name, device, index = described(x, exchange)
        assert (sizes, strides) == (tuple(x.shape), x.stride())
        assert name == str(dtype).removeprefix("torch.")
        assert (device, index) == (0, 0)
        if x.numel():
            assert data == x.data_ptr()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange API"
)
def test_both_ways_of_reading_agree():
    x = torch.randn(2, 3, 4).transpose(0, 2)
    for tensor in (x, torch.nn.Parameter(x), x.as_subclass(Subclass), x.clone().requires_grad_()):
        assert described(tensor, True) == described(tensor, False)
        assert described(tensor, True)[0] == tensor.data_ptr()


@pytest.mark.parametrize("exchange", [True, False])
def test_none_is_absent_and_other_things_are_refused(exchange):
    assert described(None, exchange)[1:3] == ((), ())
    with pytest.raises(TypeError, match=r"tensor 0 of the call is a list; expected a torch.Tensor"):
        described([1.0], exchange)
    with pytest.raises(TypeError, match=r"is of torch.complex64; the native library takes"):
        described(torch.zeros(2, dtype=torch.complex64), exchange)
    with pytest.raises(TypeError, match=r"is of torch.bool"):
        described(torch.zeros(2, dtype=torch.bool), exchange)
    with pytest.raises(ValueError, match="7 dimensions; at most 6"):
        described(torch.zeros(1, 1, 1, 1, 1, 1, 1), exchange)


@pytest.mark.parametrize("exchange", [True, False])
def test_reading_leaks_no_references(exchange):
    tensors, _ = key_scan_tensors()
    objects = [tensors, *(t for t in tensors if t is not None)]
    native.use_exchange_api(exchange)
    _library.call(FORWARD, "cpu", tensors)
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(50):
        _library.call(FORWARD, "cpu", tensors)
    assert [sys.getrefcount(x) for x in objects] == before


# ---- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("container", [list, tuple])
def test_a_call_computes(exchange, container):
    tensors, expected = key_scan_tensors()
    native.use_exchange_api(exchange)
    _library.call(FORWARD, "auto", container(tensors))
    torch.testing.assert_close(tensors[O].double(), expected, rtol=1e-5, atol=1e-5)


def test_calls_from_many_threads():
    def one(_):
        tensors, expected = key_scan_tensors(batch=1, tokens=64)
        _library.call(FORWARD, "cpu", tensors)
        torch.testing.assert_close(tensors[O].double(), expected, rtol=1e-5, atol=1e-5)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(32)))


@pytest.mark.parametrize("exchange", [True, False])
def test_tensors_without_data_are_refused(exchange):
    native.use_exchange_api(exchange)
    with FakeTensorMode():
        fake, _ = key_scan_tensors()
    with pytest.raises(
        RuntimeError, match=r"key_scan.forward: s has no data. It is a fake or meta tensor"
    ):
        _library.call(FORWARD, "cpu", fake)
    # Shapes alone are enough to choose.
    assert _library.choose(FORWARD, "auto", fake) == "cpu"
    meta = [t if t is None else t.to("meta") for t in key_scan_tensors()[0]]
    with pytest.raises(NotImplementedError, match="neither on the CPU nor on a CUDA device"):
        _library.call(FORWARD, "auto", meta)


def test_bad_calls():
    tensors, _ = key_scan_tensors()
    with pytest.raises(
        ValueError, match=r"no native function 'key_scan.sideways'; this build has .*"
    ):
        _library.function("key_scan.sideways")
    with pytest.raises(ValueError, match="no function number 99"):
        _library.call(99, "cpu", tensors)
    for name in ("gpu", "", "emulate:cpu", "emulate:gpu", "emulated", "emulate:auto"):
        with pytest.raises(
            ValueError, match=f"backend is '{name}'; expected one of auto, reference"
        ):
            _library.call(FORWARD, name, tensors)
    for wrong in ([], [tensors[0]] * 33):
        with pytest.raises(ValueError, match=f"got {len(wrong)} tensors, expected 9"):
            _library.call(FORWARD, "cpu", wrong)
    with pytest.raises(ValueError, match="s is missing"):
        _library.call(FORWARD, "cpu", [None, *tensors[1:]])
    with pytest.raises(TypeError, match="tuple or a list"):
        _library.call(FORWARD, "cpu", 3)
    with pytest.raises(ValueError, match="got 1 scalars, expected 0"):
        _library.call(FORWARD, "cpu", tensors, ("one",))


def test_numbers_are_what_the_list_says():
    select = _library.function("select_topk.forward")
    tensors = [torch.randn(2, 5), torch.zeros(2, 3, dtype=torch.int64)]
    with pytest.raises(TypeError, match="keep_order is a str, expected an integer"):
        _library.call(select, "cpu", tensors, ("one",))
    with pytest.raises(TypeError, match="keep_order is a float, expected an integer"):
        _library.call(select, "cpu", tensors, (1.0,))
    with pytest.raises(ValueError, match="keep_order is 7, expected 0 or 1"):
        _library.call(select, "cpu", tensors, (7,))
    with pytest.raises(ValueError, match="keep_order does not fit 64 bits"):
        _library.call(select, "cpu", tensors, (2**70,))
    _library.call(select, "cpu", tensors, (True,))


# ---- backends and reasons ------------------------------------------------------------------------


def test_reasons_name_every_backend():
    tensors, _ = key_scan_tensors()
    reasons = _library.reasons(FORWARD, tensors)
    assert list(reasons) == list(_library.BACKENDS)
    assert reasons["cpu"] == ""
    cuda = _library.info()["cuda"]
    for name in ("simt", "sm80", "sm90"):
        expected = (
            "the tensors are on the CPU" if cuda["built"] else "this build has no CUDA code ("
        )
        assert reasons[name].startswith(expected)
    with pytest.raises(NotImplementedError, match=r"key_scan.forward: backend 'simt' cannot take"):
        _library.call(FORWARD, "simt", tensors)


def test_a_dtype_that_no_kernel_takes():
    tensors, _ = key_scan_tensors()
    integers = [None if t is None else t.to(torch.int32) for t in tensors]
    with pytest.raises(TypeError, match=r"key_scan.forward: s is of int32, expected float64"):
        _library.call(FORWARD, "auto", integers)


def test_the_cpu_needs_no_workspace():
    assert _library.workspace(FORWARD, "cpu", key_scan_tensors()[0]) == 0


# ---- instruction sets ----------------------------------------------------------------------------


def test_every_instruction_set_agrees():
    results = {}
    tensors, expected = key_scan_tensors(torch.float32, tokens=37, dim=19)
    for isa in _library.info()["cpu"]["available"]:
        _library.set_cpu_isa(isa)
        assert _library.info()["cpu"]["isa"] == isa
        tensors[O].fill_(float("nan"))
        _library.call(FORWARD, "cpu", tensors)
        results[isa] = tensors[O].clone()
    assert "baseline" in results or "neon" in results
    for result in results.values():
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_instruction_set_for_some_instances_only():
    """Built for bf16 attention; the rest computes what the next weaker set does, bit for bit."""
    if "avx512bf16" not in _library.info()["cpu"]["available"]:
        pytest.skip("this machine or this build has no avx512bf16")
    built = {
        (op["name"], i["dtype"])
        for op in _library.info()["operators"]
        for i in op["instances"]
        if i["isa"] == "avx512bf16"
    }
    engine = ("attention", "routing_attention", "window_attention")
    assert built == {(name, "bfloat16") for name in engine}
    for dtype, same in ((torch.float32, True), (torch.float16, True), (torch.bfloat16, False)):
        x = torch.randn(3, 1, 70, 2, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = {}
        for isa in ("avx512", "avx512bf16", None):
            _library.set_cpu_isa(isa)
            results[isa] = hw.attention(*x, backend="cpu")
        assert torch.equal(results["avx512"], results["avx512bf16"]) == same, dtype
        assert torch.equal(results[None], results["avx512bf16"]), "the best that there is"
        torch.testing.assert_close(results["avx512"], results["avx512bf16"], rtol=0.02, atol=0.02)


def test_an_instruction_set_without_a_dtype():
    """fp64 stops at avx2: the wider set has all other instances of an operator, and no more."""
    if "avx512" not in _library.info()["cpu"]["built"]:
        pytest.skip("this build has no avx512")
    for op in _library.info()["operators"]:
        built = {
            isa: {i["dtype"] for i in op["instances"] if i["isa"] == isa}
            for isa in ("avx2", "avx512")
        }
        assert "float64" in built["avx2"], op["name"]
        assert built["avx512"] == built["avx2"] - {"float64"}, op["name"]


def test_lanes_without_a_row_add_nothing():
    """Behind an odd number of rows lies a lane whose weight, e^(0 + 100 - 0), is infinite. Neither
    gradients of keys nor column sums may meet it: a bias that all keys share changes nothing."""
    q, k, v, g = torch.randn(4, 1, 33, 2, 16, generator=torch.Generator().manual_seed(1)).unbind()
    for isa in _library.info()["cpu"]["available"]:
        _library.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for bias in (0.0, 100.0):
                x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
                options = {"key_bias": torch.full((1, 2, 33), bias), "backend": "cpu"}
                grads = torch.autograd.grad(hw.attention(*x, **options), x, g.to(dtype))
                results.append([*grads, hw.attention_transpose(*x[:2], g.to(dtype), **options)])
            for plain, shifted in zip(*results, strict=True):
                torch.testing.assert_close(shifted, plain, rtol=0.03, atol=0.01)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what there is")
def test_the_instruction_sets_are_those_of_the_machine():
    needed = {"avx2": "avx2 fma f16c", "avx512": "avx512f avx512dq avx512bw avx512vl"}
    needed["avx512bf16"] = needed["avx512"] + " avx512_bf16"
    flags = set(Path("/proc/cpuinfo").read_text().split())
    cpu = _library.info()["cpu"]
    for isa in set(needed) & set(cpu["built"]):
        assert (isa in cpu["available"]) == (set(needed[isa].split()) <= flags), isa


def test_an_instruction_set_that_is_unknown():
    with pytest.raises(
        ValueError, match="cpu_isa is 'mmx', but this build has the CPU instruction"
    ):
        _library.set_cpu_isa("mmx")


def in_a_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_the_environment_chooses_the_instruction_set():
    code = "from headworks import _library as L; print(L.info()['cpu']['isa'])"
    weakest = _library.info()["cpu"]["built"][0]
    assert in_a_new_process(code, HEADWORKS_CPU_ISA=weakest).stdout.strip() == weakest
    code = (
        "import torch, headworks as hw\n"
        "try: hw.key_scan(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 4))\n"
        "except ValueError as error: print(error)"
    )
    result = in_a_new_process(code, HEADWORKS_CPU_ISA="mmx")
    assert "HEADWORKS_CPU_ISA is 'mmx', but this build has" in result.stdout, result.stderr


# ---- loading -------------------------------------------------------------------------------------


def load_message(folder: Path | str) -> str:
    """The message of the ImportError when the library is looked for in `folder`."""
    code = "try: import headworks\nexcept ImportError as error: print(error)\nelse: print('loaded')"
    result = in_a_new_process(code, HEADWORKS_LIBRARY_DIR=str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_missing_library_says_what_where_and_how(tmp_path):
    text = load_message(tmp_path)
    for part in ("the native module _C for Python 3.", str(tmp_path), "HEADWORKS_LIBRARY_DIR",
                 "nothing is there", "pip install"):  # fmt: skip
        assert part in text
    assert "that folder does not exist" in load_message(tmp_path / "nowhere")
    (tmp_path / "_C.cpython-27.so").touch()
    assert "it has only _C.cpython-27.so, for another Python" in load_message(tmp_path)


def test_a_library_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / f"_C{Path(native.__file__).name[2:]}").write_text("not a library")
    text = load_message(tmp_path)
    assert "cannot be loaded" in text
    assert "pip install --force-reinstall" in text


def test_import_touches_no_gpu_and_loads_no_emulator():
    code = (
        "import sys, headworks, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'headworks_emulator' not in open('/proc/self/maps').read()"
    )
    result = in_a_new_process(code)
    assert result.returncode == 0, result.stderr


def test_without_the_emulator_the_remedy_is_named(tmp_path):
    """A copy of the libraries without the emulator."""
    for file in Path(native.__file__).parent.glob("*.so"):
        if "emulator" not in file.name:
            shutil.copy(file, tmp_path)
    code = (
        "import torch\n"
        "from headworks import _library as L\n"
        "assert L.info()['emulator'] is None\n"
        "s, v = torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 4)\n"
        "f, t = L.function('key_scan.forward'), [s, v, None, None, v, s] + [None] * 3\n"
        "print(L.reasons(f, t)['emulate:simt'])\n"
        "try: L.call(f, 'emulate:simt', t)\n"
        "except NotImplementedError as error: print(error)"
    )
    result = in_a_new_process(code, HEADWORKS_LIBRARY_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "this build has no emulator" in line
        assert "HEADWORKS_PRESET=emu" in line


# ---- the emulator --------------------------------------------------------------------------------

needs_emulator = pytest.mark.skipif(
    _library.info()["emulator"] is None, reason="this build has no emulator"
)


@needs_emulator
def test_the_emulator_runs_the_kernel():
    tensors, expected = key_scan_tensors(torch.float32)
    assert _library.choose(FORWARD, "emulate", tensors) == "emulate:simt"
    for order in ("forward", "reverse", "shuffled"):
        for copies in ("late", "early", "mixed"):
            _library.configure_emulator(seed=1, order=order, copies=copies)
            tensors[O].fill_(float("nan"))
            _library.call(FORWARD, "emulate:simt", tensors)
            torch.testing.assert_close(tensors[O].double(), expected, rtol=1e-5, atol=1e-5)
    _library.configure_emulator()


@needs_emulator
def test_emulator_settings_are_checked():
    with pytest.raises(ValueError, match="order is 'sideways'; expected one of forward, reverse"):
        _library.configure_emulator(order="sideways")
    with pytest.raises(ValueError, match="copies is 'never'"):
        _library.configure_emulator(copies="never")
    with pytest.raises(ValueError, match="multiprocessors is '0'; expected a number from 1 on"):
        _library.configure_emulator(multiprocessors=0)
    with pytest.raises(ValueError, match=r"capability is '8\.6'"):
        _library.configure_emulator(capability="8.6")
    _library.configure_emulator()


@needs_emulator
def test_the_emulated_device_has_the_capability_that_was_set():
    q = torch.randn(1, 5, 1, 16, dtype=torch.bfloat16)
    try:
        _library.configure_emulator(capability=75)
        assert hw.explain(hw.attention, q, q, q).reasons["emulate:simt"] == ""
        with pytest.raises(NotImplementedError, match="emulated device is sm_75, and the code is"):
            hw.attention(q, q, q, backend="emulate:sm80")
    finally:
        _library.configure_emulator()
    assert hw.attention(q, q, q, backend="emulate:sm80").isfinite().all()


@needs_emulator
@pytest.mark.parametrize(
    "backend, dtype", [("emulate:simt", torch.float32), ("emulate:sm80", torch.bfloat16)]
)
def test_plans_are_made_for_the_multiprocessors_that_were_set(backend, dtype):
    """One query over many keys is split over the device: the partial results need workspace."""
    q, k = (torch.randn(1, s, 1, 16, dtype=dtype) for s in (1, 4096))
    seen, asked = [], []

    def spy(size, like):
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8, device=like.device)

    native.set_allocator(spy)
    try:
        for count in (1, 4, 132):
            _library.configure_emulator(multiprocessors=count)
            seen.append(hw.attention(q, k, k, backend=backend))
    finally:
        _library.configure_emulator()
        native.set_allocator(_library._workspace)
    assert len(asked) == 3 and asked[0] < asked[1] < asked[2]
    expected = hw.attention(q, k, k, backend="reference")
    for o in seen:
        torch.testing.assert_close(o, expected)


@needs_emulator
def test_what_the_allocator_raises_arrives():
    """A call without memory for its workspace does not run, and says what Python said."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 4096, 1, 16)

    def refuse(size, like):
        raise MemoryError(f"{size} bytes")

    native.set_allocator(refuse)
    try:
        with pytest.raises(MemoryError, match=r"\d+ bytes"):
            hw.attention(q, k, k, backend="emulate:simt")
    finally:
        native.set_allocator(_library._workspace)
