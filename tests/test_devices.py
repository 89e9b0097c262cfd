# SPDX-License-Identifier: Apache-2.0
"""Calls planned for other devices than the emulator's usual one: less shared memory for a block;
and what the tensor-core kernels decline."""

from __future__ import annotations

import pytest
import torch

import headworks as hw
from backends import identify, native_info, targets
from headworks import _library
from headworks.testing import check_case, compare
from specs import SPECS

pytestmark = pytest.mark.operator

# By backend: the device with the least shared memory per block that the backend is for.
SMALLEST = {
    "emulate:simt": {"capability": 75, "shared_bytes": 64 * 1024},
    "emulate:sm80": {"capability": 86, "shared_bytes": 99 * 1024},
}


@pytest.fixture
def configure():
    if not native_info().get("emulator"):
        pytest.skip("the emulator is not built (preset emu)")
    yield _library.configure_emulator
    _library.configure_emulator()


def on_small_devices():
    for spec in SPECS:
        for backend, _, dtype in targets(spec, emulated=True):
            if dtype == (torch.float32 if backend == "emulate:simt" else torch.bfloat16):
                yield pytest.param(spec, backend, dtype, id=identify(spec, backend, dtype))


@pytest.mark.parametrize("spec, backend, dtype", list(on_small_devices()))
def test_every_kernel_fits_the_smallest_device(spec, backend, dtype, configure):
    """The emulator refuses a launch that asks for more shared memory than the device has; what
    declines such a device says so."""
    configure(**SMALLEST[backend])
    for case in spec.emulator_cases:
        if spec.limit(backend, case):
            continue
        try:
            check_case(spec, case, backend, dtype)
        except NotImplementedError as error:
            assert "bytes of shared memory a block, the device has" in str(error)
            assert spec.name == "cascaded_group_attention"


@pytest.mark.parametrize("value_dim", [65, 100, 128, 200])
def test_linear_attention_on_99_kilobytes(value_dim, configure):
    """sm_86, sm_89, sm_120: gradients of more than 64 columns of v come in slices."""
    configure(capability=86, shared_bytes=99 * 1024)
    q, k = (torch.randn(1, 150, 2, 16).bfloat16() for _ in range(2))
    v, g = (torch.randn(1, 150, 2, value_dim).bfloat16() for _ in range(2))

    def gradients(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = hw.linear_attention(*inputs, backend=backend)
        return torch.autograd.grad(o, inputs, g.to(dtype))

    oracle, rough = gradients("reference", torch.float64), gradients("reference", torch.bfloat16)
    for x, y, r in zip(gradients("emulate:sm80", torch.bfloat16), oracle, rough, strict=True):
        compare(x, y, torch.bfloat16, reference=r)


@pytest.mark.no_comparison
def test_tensor_cores_decline_wide_cascades_on_99_kilobytes(configure):
    """Tiles of two heads of 112 channels take more; simt has a workspace."""
    spec = next(s for s in SPECS if s.name == "cascaded_group_attention")
    case = next(c for c in spec.emulator_cases if c.sizes["d"] == 112)
    tensors = spec.make(case, torch.bfloat16)
    spec.run(tensors, case, "emulate:sm80")
    configure(capability=86, shared_bytes=99 * 1024)
    with pytest.raises(NotImplementedError, match=r"needs \d+ bytes .* a block, the device has"):
        spec.run(tensors, case, "emulate:sm80")
    wide = {n: x.float() for n, x in tensors.items()}
    assert spec.run(wide, case, "emulate:simt")["y"].isfinite().all()


@pytest.mark.no_comparison
@pytest.mark.parametrize("scale, loss", [(1e-8, "o"), (1e8, "o"), (0.0, "kv"), (0.0, "z")])
def test_scales_that_tensor_cores_decline(scale, loss, configure):
    """Of linear attention's gradients: what is divided by the scale must not leave fp32."""
    q, k, v = (torch.randn(1, 70, 1, 16).bfloat16().requires_grad_() for _ in range(3))
    o, state = hw.linear_attention(
        q, k, v, scale=scale, normalize=False, output_final_state=True, backend="emulate:sm80"
    )
    outputs = {"o": o, "kv": state.kv, "z": state.z}
    with pytest.raises(NotImplementedError, match=r"\|scale\| = .* is not in 1e-6 .. 1e6"):
        outputs[loss].sum().backward()
