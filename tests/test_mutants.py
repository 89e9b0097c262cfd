# SPDX-License-Identifier: Apache-2.0
"""ci/mutants.py: what it changes, that each switch changes that alone, and how it judges."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "ci" / "mutants"
sys.path.insert(0, str(FOLDER))

import judge  # noqa: E402
from rewrite import Finder, rewritten  # noqa: E402

SOURCE = """// SPDX-License-Identifier: Apache-2.0
#include <vector>
#if defined(HW_EMULATE)
constexpr int kFive = 2 + 3;
#else
int never(int a) { return a + 1; }
#endif
struct Pair {
  int data[4];
  int at(int i, int j) const { return data[i] * 10 + j; }
};
template <class T> T twice(const T& x) { return x + x; }
static void set(int& x, int to) { x = to; }
void sync_block() {}
template <int n> struct Sized { static_assert(n > 0, "n"); int room[n]; };
extern "C" int work(int n, int m) {
  const Pair pair{{1, 2, 3, 4}};
  Sized<kFive> sized;
  int sum = 0;
  for (int i = 0; i < 3; ++i) sum += pair.data[i];
  if (n > 4 && m != 2) sum -= 100;
  set(sum, sum - 1);
  sync_block();
  sum = sum * (n ? 2 : 3) + pair.at(n, m) + twice(-m);
  if constexpr (kFive > 4) sum += !n;
  return sum + static_cast<int>(sizeof(sized.room) / sizeof(int));
}
"""


def found():
    return Finder("sample.h", SOURCE).find()


def described(kind):
    return [(m.original, m.mutated) for m in found() if m.kind == kind]


def test_sizes_of_arrays_are_left_alone():
    source = (
        "void f(int i) {\n  int a[kN] = {}, b[2];\n  const int *c[kN], *d[kN];\n  g(a[i]);\n}\n"
    )
    changes = [(m.kind, m.original) for m in Finder("sample.h", source).find()]
    assert ("index", "[i]") in changes
    assert not any("[kN]" in what or kind == "constant" for kind, what in changes)


def test_what_is_changed():
    comparisons = described("comparison")
    assert any("i < 3" in a and "i <= 3" in b for a, b in comparisons)
    assert any("m != 2" in a and "m == 2" in b for a, b in comparisons)
    assert ("set(sum, sum - 1);", "") in described("call left out")
    assert ("sync_block();", "") in described("barrier left out")
    assert ("[i]", "[i + 1]") in described("index")
    assert ("at(n, m", "at(m, n") in described("swap")
    assert ("-m", "m") in described("sign") and ("!n", "n") in described("condition")
    assert any("n > 4 || m" in b for _, b in described("logic"))
    assert ("n", "!(n)") in described("condition")


def test_what_is_left_alone():
    """Constant expressions, templates, checks, and what the preprocessor takes out."""
    lines = {m.line for m in found()}
    assert not lines & {4, 6, 15}
    assert not [m for m in found() if "kFive >= 4" in m.mutated or "Sized" in m.original]


def test_a_mutant_is_the_same_wherever_its_line_is():
    moved = Finder("sample.h", SOURCE.replace("#include <vector>", "\n\n#include <vector>")).find()
    assert [m.key for m in moved] == [m.key for m in found()]
    assert len({m.key for m in moved}) == len(moved)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """SOURCE with all its mutants, compiled."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "core").mkdir()
    shutil.copy(FOLDER / "switch.h", folder / "core" / "mutants.h")
    mutants = dict(enumerate(found(), 1))
    text = rewritten(SOURCE, mutants)
    assert text.count("\n") == SOURCE.count("\n")
    state = f"int hw_mutant_state; unsigned char hw_mutant_hits[{len(mutants) + 1}];\n"
    (folder / "a.cpp").write_text(text + f'extern "C" {{ {state} }}')
    file = folder / "a.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-DHW_EMULATE", "-I", str(folder)]
    subprocess.run([*command, str(folder / "a.cpp"), "-o", str(file)], check=True)
    return ctypes.CDLL(str(file)), mutants


def calls(library, state):
    """work() of some arguments, those that stay inside its array for every mutant."""
    ctypes.c_int.in_dll(library, "hw_mutant_state").value = state
    return [library.work(n, m) for n, m in ((0, 1), (1, 2), (2, 0), (1, 0))]


def expected(n, m):
    total = 6 - (100 if n > 4 and m != 2 else 0) - 1
    return total * (2 if n else 3) + (n + 1) * 10 + m - 2 * m + (not n) + 5


def test_switches(library):
    """Off, the source as it is; on, each changes the result, but those of what cannot matter."""
    lib, mutants = library
    right = [expected(n, m) for n, m in ((0, 1), (1, 2), (2, 0), (1, 0))]
    assert calls(lib, 0) == right
    assert calls(lib, -1) == right
    hits = (ctypes.c_ubyte * (len(mutants) + 1)).in_dll(lib, "hw_mutant_hits")
    assert all(hits[n] for n, m in mutants.items() if m.line != 21)  # sum -= 100: not reached
    unchanged = [m for n, m in mutants.items() if calls(lib, n) == right]
    assert {m.kind for m in unchanged} <= {"barrier left out", "comparison", "constant", "sign",
                                           "assignment left out", "arithmetic"}  # fmt: skip
    assert {m.line for m in unchanged} <= {17, 21, 23}


def test_judgement():
    """Different, crashing and hanging processes, and one that notices nothing."""

    def hang():
        time.sleep(60)
        return 0

    jobs = {
        "same": (lambda: judge.SURVIVED, 5),
        "different": (lambda: judge.DIFFERENT, 5),
        "crash": (lambda: ctypes.string_at(8) and 0, 5),
        "hang": (hang, 0),
        "broken": (lambda: [][0], 5),
    }
    done = {n: status for n, (status, _) in judge.run_forked(jobs, 2).items()}
    assert done == {
        "same": 0, "different": judge.DIFFERENT, "crash": -11, "hang": -14, "broken": judge.BROKEN,
    }  # fmt: skip


def test_a_listing():
    """The command finds thousands, without building anything, and a sample depends on its seed."""
    command = [sys.executable, str(FOLDER.parent / "mutants.py"), "--list", "--sample", "30"]
    lists = [
        subprocess.run([*command, "--seed", seed], capture_output=True, text=True, check=True)
        for seed in ("1", "1", "2")
    ]
    first, again, other = (x.stdout for x in lists)
    assert first == again != other and "30 of " in first
    assert "barrier left out" in first and os.linesep in first


def test_every_explanation_is_of_a_mutant():
    """What ci/mutants/explained.json says changes nothing can still be changed."""
    sys.path.insert(0, str(FOLDER.parent))
    import builder
    import mutants

    found = builder.find(builder.sources())
    explanations = mutants.Explanations()
    for entry in explanations.entries:
        explanations.entries = [entry]
        assert any(map(explanations.reason, found)), f"explains no mutant: {entry}"
