# SPDX-License-Identifier: Apache-2.0
"""Native calls with mangled arguments: `python tests/mangle.py SEED COUNT`.

Real calls are recorded from the specs; each is called again with one or two of its arguments
spoilt. A Python exception is fine, and so is a result; the process must live. Before each call the
mutation is printed, so that the last line names the one that killed it. Run it under the sanitizers
with a library of the preset asan (ci/native.sh tells how).
"""

from __future__ import annotations

import contextlib
import random
import sys

import torch

from backends import targets
from headworks import _library
from headworks.testing import evaluate
from specs import SPECS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.uint8)  # fmt: skip
NUMBERS = (float("nan"), float("inf"), -1.0, 0.5, 1e300, -1e300, 2**31, 2**53, -(2**40), 2**62,
           -(2**63), 2**63, 0, 1, -1, 7)  # fmt: skip
LARGEST = 1 << 20  # elements: of a tensor that a mutation may make


def recorded():
    """(function, backend, tensors, scalars) of a few small cases of every spec and backend."""
    calls = []
    original = _library.call

    def record(fn, backend, tensors, scalars=()):
        kept = [None if x is None else x.detach().clone() for x in tensors]
        calls.append((fn, backend, kept, tuple(scalars)))
        original(fn, backend, tensors, scalars)

    _library.call = record
    try:
        for spec in SPECS:
            for backend, device, dtype in targets(spec):
                if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
                    continue
                for case in spec.emulator_cases[:3]:
                    # Small builds lack some dtypes and dims.
                    with contextlib.suppress(NotImplementedError):
                        evaluate(spec, case, backend, spec.make(case, dtype))
    finally:
        _library.call = original
    return calls


def spoil_tensors(rng, tensors):
    """One change of the list or of one tensor; its description."""
    i = rng.randrange(len(tensors))
    kind = rng.choice(["none", "drop", "twice", "swap", "dtype", "shrink", "grow", "rank", "empty",
                       "values", "other"])  # fmt: skip
    x = tensors[i]
    if kind == "none":
        tensors[i] = None
    elif kind == "drop":
        del tensors[i]
    elif kind == "twice":
        tensors.insert(i, x)
    elif kind == "swap":
        j = rng.randrange(len(tensors))
        tensors[i], tensors[j] = tensors[j], x
    elif x is None:
        tensors[i] = torch.zeros([rng.randrange(4) for _ in range(rng.randrange(6))])
    elif kind == "dtype":
        tensors[i] = x.to(rng.choice(DTYPES))
    elif kind in ("shrink", "grow") and x.dim() and x.numel() < LARGEST:
        d = rng.randrange(x.dim())
        size = rng.randrange(x.shape[d] + 1) if kind == "shrink" else x.shape[d] + 1
        tensors[i] = torch.zeros([*x.shape[:d], size, *x.shape[d + 1 :]], dtype=x.dtype)
    elif kind == "rank":
        tensors[i] = x[None] if rng.random() < 0.5 or not x.dim() else x.flatten()
    elif kind == "empty":
        tensors[i] = x.new_empty([0] * x.dim())
    elif kind == "values" and not x.is_floating_point() and x.numel():
        flat = x.flatten()
        wrong = rng.choice([-1, -(2**62), 2**62, 2**31, 1000, 3])
        flat[rng.randrange(flat.numel())] = torch.tensor(wrong).to(x.dtype)
        tensors[i] = flat.view(x.shape)
    else:
        tensors[i] = torch.zeros(x.shape, dtype=x.dtype).transpose(0, -1) if x.dim() else x
    return f"tensor {i} {kind}"


def spoil_scalars(rng, scalars):
    if not scalars or rng.random() < 0.2:
        scalars.append(1.0) if rng.random() < 0.5 or not scalars else scalars.pop()
        return "scalars: their number"
    i = rng.randrange(len(scalars))
    if rng.random() < 0.3:
        j = rng.randrange(len(scalars))
        scalars[i], scalars[j] = scalars[j], scalars[i]
        return f"scalars {i} and {j} swapped"
    scalars[i] = rng.choice(NUMBERS)
    return f"scalar {i} = {scalars[i]}"


def mutations(seed, count):
    """`count` calls from the seed: (description, function, backend, tensors, scalars)."""
    rng = random.Random(seed)
    calls = recorded()
    functions = sorted({call[0] for call in calls})
    for n in range(count):
        fn, backend, tensors, scalars = rng.choice(calls)
        tensors = [None if x is None else x.clone() for x in tensors]
        scalars = list(scalars)
        notes = []
        for _ in range(rng.choice((1, 1, 2))):
            what = rng.random()
            if what < 0.65:
                notes.append(spoil_tensors(rng, tensors))
            elif what < 0.95:
                notes.append(spoil_scalars(rng, scalars))
            else:
                fn = rng.choice([*functions, -1, 10**6])
                notes.append("another function")
            if not tensors:
                break
        yield f"{n}: function {fn} on {backend}, {'; '.join(notes)}", fn, backend, tensors, scalars


def main(seed, count):
    refused = 0
    for text, fn, backend, tensors, scalars in mutations(seed, count):
        print(text, flush=True)
        try:
            _library.call(fn, backend, tensors, scalars)
        except Exception as error:
            refused += 1
            print("   ", type(error).__name__, str(error)[:120], flush=True)
    print(f"lived: {count} calls, {refused} refused", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]), int(sys.argv[2]))
