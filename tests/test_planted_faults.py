# SPDX-License-Identifier: Apache-2.0
"""Faults planted into the kernels, each of which the spec-driven comparison must catch.

The sources are copied, built in the quick preset, and found right; then each fault is planted
alone, rebuilt, and must be found wrong by at least one case of its operator. One that is not found
is a hole in the cases.

HEADWORKS_FAULTS=i/n plants every n-th from the i-th on, i from 0; without it all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "cmake", "CMakeLists.txt", "CMakePresets.json", "pyproject.toml")
SELECT, ROUTE = "ops/select_topk/select_topk", "ops/kmeans_route/kmeans_route"
LINEAR, SCAN = "ops/linear_attention/linear_attention", "ops/key_scan/key_scan"
SOFT = "softmax"
ROUTING = "ops/routing_attention/routing_attention"
WINDOW = "ops/window_attention/window_attention"
WINDOWS, MIX, AV = "neighborhood", "contmix", "na2d_av"
KMEANS, BILEVEL = "kmeans_routing_attention", "bilevel_routing_attention"
CASCADE = "cascaded_group_attention"
FILES = f"ops/{CASCADE}/{CASCADE}"
WRONG = 3  # exit code of CHECK when a comparison failed

# Compares the small cases of an operator on a backend in both orders of asynchronous copies.
CHECK = """
import sys
import torch
from headworks import _library
from headworks.testing import check_case
import importlib
operator, backend, dtype = sys.argv[1:]
spec = importlib.import_module(f"specs.{operator}").SPEC
compared = 0
for copies in ("late", "early"):
    if backend.startswith("emulate:"):
        _library.configure_emulator(seed=1, order="shuffled", copies=copies)
    for case in spec.emulator_cases:
        try:
            check_case(spec, case, backend, getattr(torch, dtype))
            compared += 1
        except NotImplementedError:  # a size that the quick preset does not build
            pass
        except (AssertionError, RuntimeError) as error:
            print(f"{case}: {str(error)[:200]}")
            sys.exit(3)
    if backend == "cpu":
        break
assert compared > 3, "hardly anything was compared"
print("no difference in", compared, "comparisons")
"""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # under csrc/, without the operator's part of the name
    right: str  # occurs once
    wrong: str
    operator: str
    backend: str
    dtype: str = "float32"


def cpu(name, file, right, wrong, operator="linear_attention"):
    return Fault(name, file, right, wrong, operator, "cpu")


def simt(name, file, right, wrong, operator="linear_attention"):
    return Fault(name, file, right, wrong, operator, "emulate:simt")


def sm80(name, file, right, wrong, operator="linear_attention"):
    return Fault(name, file, right, wrong, operator, "emulate:sm80", "bfloat16")


FAULTS = (
    cpu("wrong_sign", f"{LINEAR}_cpu_scan.h", "d * (A(1) + score)", "d * (A(1) - score)"),
    cpu("mask_off_by_one", f"{LINEAR}_cpu_chunk.h", "Range{a + 1, columns.end}",
        "Range{a + 2, columns.end}"),
    cpu("state_not_carried", f"{LINEAR}_cpu.cpp",
        "if (!last || ends_.kv_end) accumulate(shape_, scan.local(), prefix);", ""),
    cpu("wrong_feature", f"{LINEAR}_cpu_step.h", "state = fma(k, v[j], state);",
        "state = fma(q, v[j], state);", "linear_attention_step"),
    cpu("wrong_sign", f"{SCAN}_cpu.cpp", "t -= p_.d_lse1", "t += p_.d_lse1", "key_scan"),
    cpu("mix_exchanged", f"{SCAN}_cpu.cpp", "before / whole, own / whole};",
        "own / whole, before / whole};", "key_scan"),
    simt("mask_off_by_one", f"{LINEAR}_simt_tiles.cuh", "inner <= outer : inner >= outer",
         "inner < outer : inner >= outer"),
    simt("wrong_sign", f"{LINEAR}_simt_chunk_loop.cuh", "(ds[r][u] + extra) *",
         "(ds[r][u] - extra) *"),
    simt("missing_barrier", f"{LINEAR}_simt_chunk_loop.cuh",
         "load_inner(tile);\n      dev::sync_block();\n      add_scores",
         "load_inner(tile);\n      add_scores"),
    simt("missing_barrier", f"{LINEAR}_simt_step.cuh",
         "make_features(first, count);\n        dev::sync_block();",
         "make_features(first, count);", "linear_attention_step"),
    simt("scan_off_by_one", f"{SCAN}_simt_forward.cuh", "if (u.lane >= n) x = join(earlier, x);",
         "if (u.lane > n) x = join(earlier, x);", "key_scan"),
    simt("wrong_sign", f"{SCAN}_simt_backward.cuh", "unit_sum(sum - t, g.lanes)",
         "unit_sum(sum + t, g.lanes)", "key_scan"),
    sm80("missing_wait", f"{LINEAR}_sm80_loop.cuh", "dev::copy_async_wait<0>();", ""),
    sm80("mask_off_by_one", f"{LINEAR}_sm80_forward.cuh", "{ return key <= row; }",
         "{ return key < row; }"),
    sm80("wrong_sign", f"{LINEAR}_sm80_backward.cuh", "value *= p.scale * weight_derivative",
         "value *= -p.scale * weight_derivative"),
    cpu("not_rescaled", f"{SOFT}/cpu/forward.h", "if (sum<A>(moved) != 0) rescale(",
        "if (false) rescale(", "attention"),
    cpu("gate_forgotten", f"{SOFT}/cpu/outputs.h", "square[r] * gates[r]", "square[r]",
        "moh_attention"),
    cpu("lanes_left_out", f"{SOFT}/cpu/operands.h", "{begin / vector * vector,",
        "{round_up(begin, vector),", "moh_attention"),
    cpu("wrong_sign", f"{SOFT}/cpu/block_gradients.h", "(load(ds + at) - load(delta_of_ + l))",
        "(load(ds + at) + load(delta_of_ + l))", "attention"),
    cpu("mask_off_by_one", f"{SOFT}/cpu/tile.h", "load(last_ + l) <= key", "load(last_ + l) < key",
        "attention"),
    cpu("weight_ignored", f"{SOFT}/cpu/columns.h", "if (!p_.row_weight) return 1;",
        "return 1;", "column_stats"),
    simt("not_rescaled", f"{SOFT}/simt/forward.cuh", "if (soft) rescale(factor);", "",
         "attention"),
    simt("wrong_sign", f"{SOFT}/simt/gradient.cuh", "(dp[0][u] - tile.extra(r, u))",
         "(dp[0][u] + tile.extra(r, u))", "attention"),
    simt("mask_off_by_one", f"{SOFT}/simt/tile.cuh", "key < seen.end;",
         "key <= seen.end;", "attention"),
    simt("weight_ignored", f"{SOFT}/simt/columns.cuh", "weight * tile.extra(r, u) : weight;",
         "weight : weight;", "column_stats"),
    sm80("missing_wait", "core/gpu/tile.cuh", "dev::copy_async_wait<0>();", "", "attention"),
    sm80("stage_reused", "core/gpu/tile.cuh", "wait<0>();\n    dev::sync_block();", "wait<0>();",
         "attention"),
    sm80("not_rescaled", f"{SOFT}/sm80/forward.cuh", "w.scale_row(strip, half, factor);", "",
         "attention"),
    sm80("wrong_sign", f"{SOFT}/sm80/score.cuh", "slope * (dp.at[s][j][i] - t.extra)",
         "slope * (dp.at[s][j][i] + t.extra)", "attention"),
    sm80("mask_off_by_one", f"{SOFT}/sm80/score.cuh", "column >= end)", "column > end)",
         "attention"),
    sm80("sums_of_one_head", f"{SOFT}/sm80/backward.cuh",
         "head < (owner + 1) * p.heads_of_owner();", "head < owner * p.heads_of_owner() + 1;",
         "attention"),
    sm80("units_not_exchanged", "core/gpu/store.cuh", "dev::shuffle_xor(upper ? low : high, step)",
         "(upper ? low : high)", "attention"),
    sm80("weight_ignored", f"{SOFT}/sm80/columns.cuh",
         "w * score.operands.numbers[Scores::column(j, i)].v[2] : w;", "w : w;", "column_stats"),
    sm80("mask_off_by_one", f"{SOFT}/sm80/score.cuh", "column < end[s]", "column <= end[s]",
         KMEANS),
    sm80("self_seen", f"{SOFT}/sm80/score.cuh", "seen && is_set(set[s][i / 2], column)",
         "seen && column < 0", KMEANS),
    simt("one_element_of_a_vector", f"{SOFT}/simt/row_dot.cuh", "static_cast<A>(right.v[n])",
         "static_cast<A>(right.v[0])", "attention"),
    cpu("squares_of_rows", f"{SOFT}/cpu/row_dot.h", "row(y_, batch, i, head, y)",
        "row(x_, batch, i, head, y)", "attention"),
    sm80("weights_of_another_team", f"{SOFT}/sm80/backward.cuh", "smem.weights[team]",
         "smem.weights[0]", "attention"),
    sm80("delta_of_the_query_before", f"{SOFT}/sm80/score.cuh",
         "terms_of(F::column(j, 1)).extra}", "terms_of(F::column(j, 0)).extra}", "attention"),
    sm80("tokens_not_there", f"{SOFT}/sm80/loop.cuh", ".fill(smem.tokens.other[begin % 3]);\n"
         "      dev::sync_block();", ".fill(smem.tokens.other[begin % 3]);", KMEANS),
    sm80("tokens_of_the_last_tile", f"{SOFT}/sm80/loop.cuh", "next(list, (tile + 1) * kOther)",
         "next(list, tile * kOther)", KMEANS),
    sm80("padding_hidden", f"{SOFT}/sm80/score.cuh", "kKeysAsRows ? kNever : kZeroKey",
         "kNever", BILEVEL),
    sm80("rows_of_one_listing", f"{ROUTING}_source.h",
         "w.first_listing + slot / row_slots_of_list", "w.first_listing", BILEVEL),
    sm80("lists_of_one_head", f"{ROUTING}_source.h", "entries(w.at.batch, w.head, group,",
         "entries(w.at.batch, 0, group,", "moh_attention"),
    cpu("sum_not_carried", f"{SOFT}/cpu/along_keys.h", "store(to, load(to) + across",
        "store(to, across", "attention"),
    cpu("rows_not_rescaled", f"{SOFT}/cpu/along_keys.h", "!empty_ && sum<A>(moved) != 0",
        "false", "attention"),
    cpu("zero_key_left_out", f"{SOFT}/cpu/operands.h", "token < 0 ? absent : first + token",
        "first + (token < 0 ? 0 : token)", BILEVEL),
    cpu("group_of_the_next", f"{ROUTING}_cpu_lists.h", "task / head_parts_ % groups_);",
        "task / head_parts_ / groups_);", BILEVEL),
    cpu("tie_too_many", f"{SELECT}_cpu.cpp", "return {t, p_.k() - count(",
        "return {t, 1 + p_.k() - count(", "select_topk"),
    simt("ties_reversed", f"{SELECT}_simt.cuh", "(other == own && m < j)",
         "(other == own && m > j)", "select_topk"),
    simt("first_bucket_lost", "core/gpu/csr.cuh", "return x >= 0 && x < p.csr.buckets ?",
         "return x > 0 && x < p.csr.buckets ?", KMEANS),
    simt("eps_ignored", f"{ROUTING}_slots.cuh",
         "sum / (static_cast<A>(count) + static_cast<A>(p.eps))", "sum / static_cast<A>(count)",
         KMEANS),
    simt("sums_of_one_head", f"{ROUTING}_slots.cuh", "h < (head + 1) * p.share; ++h",
         "h < head * p.share + 1; ++h", KMEANS),
    simt("wrong_sign", f"{SOFT}/simt/row_dot.cuh", "p.dot(b, head, i) = sum;",
         "p.dot(b, head, i) = -sum;", KMEANS),
    simt("mask_off_by_one", f"{SOFT}/simt/tile.cuh", "key < seen.end;", "key < seen.end - 1;",
         KMEANS),
    simt("self_seen", f"{ROUTING}.h", "return mask_self ? mask.diagonal(row) : kNoKey;",
         "return kNoKey;", KMEANS),
    simt("padding_hidden", f"{SOFT}/simt/loop.cuh",
         "return kGathers && token<false>(key) == kZeroKey;", "return false;", BILEVEL),
    simt("first_span_again", f"{ROUTING}_simt_layout.h",
         "begin[r] + most * (t - first_of(list)[r])", "begin[r]", BILEVEL),
    simt("spans_not_merged", f"{ROUTING}_slots.cuh", "in_region, first[0], first[1]};",
         "in_region, first[0], first[0] + 1};", BILEVEL),
    simt("list_of_one_head", f"{ROUTING}_source.h", "return l.entries(w.at.batch, w.head, group,",
         "return l.entries(w.at.batch, 0, group,", "moh_attention"),
    simt("own_side_not_loaded", f"{SOFT}/simt/loop.cuh", "(kInOrder ? tile_ > 0 : started_)",
         "tile_ > 0", "moh_attention"),
    cpu("centroids_of_one_head", f"{ROUTE}_cpu.cpp", "packed(head), width_,", "packed(0), width_,",
        "kmeans_route"),
    cpu("ties_reversed", f"{ROUTE}_cpu.cpp", "position < other.position",
        "position > other.position", "kmeans_route"),
    simt("missing_barrier", f"{ROUTE}_simt.cuh", "load(first);\n        dev::sync_block();",
         "load(first);", "kmeans_route"),
    simt("ties_reversed", f"{ROUTE}_simt.cuh", "other.v[v] >= own", "other.v[v] > own",
         "kmeans_route"),
    simt("buffer_not_filled", f"{ROUTE}_simt.cuh", "dev::sync_block();\n        next =",
         "next =", "kmeans_route"),
    cpu("mask_off_by_one", f"{ROUTING}_cpu_group.h", "first_not_below(end, visible.end)",
        "first_not_below(end, visible.end + 1)", KMEANS),
    cpu("slots_counted_once", f"{ROUTING}_cpu_mean.h", "count[token] += 1;", "count[token] = 1;",
        KMEANS),
    cpu("wrong_delta", f"{ROUTING}_cpu_lists.h", "inner_product(x, y, width)",
        "inner_product(x, x, width)", KMEANS),
    cpu("factor_ignored", f"{ROUTING}_cpu_lists.h", "factor * inner_product(", "inner_product(",
        KMEANS),
    cpu("sums_begun_again", f"{ROUTING}_cpu_lists.h", "given_[token] = true;", "", KMEANS),
    cpu("values_forgotten", f"{ROUTING}_cpu_lists.h",
        "d_v.add(token, d_v_ + j * padded_values_);", "", BILEVEL),
    cpu("first_row_dropped", f"{ROUTING}_cpu_rows.h", "if (token >= 0) rows", "if (token > 0) rows",
        "moh_attention"),
    cpu("chosen_by_sign", "ops/moh_route/moh_route_cpu.cpp", "!= T(0) ?", "> T(0) ?",
        "moh_attention"),
    simt("places_of_the_last", "ops/moh_route/moh_route_simt.cuh", "listed + rank.before",
         "rank.before + (listed > 0)", "moh_attention"),
    cpu("rows_of_the_window_alone", f"{WINDOW}_cpu_source.h",
        "*to++ = y * grid_.columns_of_image + x;", "*to++ = y * shapes_[s].width + x;",
        "window_attention"),
    cpu("width_of_the_shape", f"{WINDOW}_cpu_source.h",
        "std::abs(of_y - y) * table_width_", "std::abs(of_y - y) * width", "window_attention"),
    cpu("table_of_one_part", f"{WINDOW}_cpu.cpp", "sum += table_of(part, head)[b];",
        "sum = table_of(part, head)[b];", "window_attention"),
    cpu("keys_of_the_window_before", f"{WINDOW}_cpu.cpp",
        "std::fill_n(sums.d_k, slots * (padded_ + padded_values_), A(0));", "",
        "window_attention"),
    simt("window_of_another_entry", f"{WINDOW}_source.h", "static_cast<int>(n % windows);",
         "static_cast<int>(n / windows);", "window_attention"),
    simt("signed_distance", f"{WINDOW}.h", "(dx < 0 ? -dx : dx)", "(dx < 0 ? 0 : dx)",
         "window_attention"),
    simt("one_diagonal", f"{WINDOW}_bias.cuh", "if (a != 0 && c != 0)", "if (false)",
         "window_attention"),
    simt("sequences_of_others", f"{SOFT}/simt/backward.cuh",
         "n < p.sequences; n += owners(b, 0, 1)", "n < p.sequences; n += 1", "window_attention"),
    simt("first_window_of_a_part", f"{SOFT}/simt/backward.cuh",
         "n < p.sequences; n += owners(b, 0, 1)", "n <= batch; n += owners(b, 0, 1)",
         "window_attention"),
    sm80("first_window_of_a_part", f"{SOFT}/sm80/backward.cuh",
         "n < p.sequences; n += owners(b, 0, 1)", "n <= batch; n += owners(b, 0, 1)",
         "window_attention"),
    sm80("sequences_of_others", f"{SOFT}/sm80/backward.cuh",
         "n < p.sequences; n += owners(b, 0, 1)", "n < p.sequences; n += 1", "window_attention"),
    sm80("bias_of_one_head", f"{WINDOW}_bias.cuh", "p.table(head, bin(", "p.table(0, bin(",
         "window_attention"),
    cpu("padding_in_means", "ops/bilevel_route/bilevel_route_cpu.cpp",
        "p_.part(first + c).count())", "p_.grid.size())", "bilevel_route"),
    simt("padding_in_means", "ops/bilevel_route/bilevel_route_simt.cuh",
         "static_cast<A>(part.count())", "static_cast<A>(f.grid.size())", "bilevel_route"),
    simt("sides_exchanged", "ops/bilevel_route/bilevel_route_simt.cuh",
         "smem.q[i][c] * smem.k[j][c]", "smem.q[j][c] * smem.k[i][c]", "bilevel_route"),
    cpu("last_query_forgotten", f"{WINDOWS}/window.h", "j >= size - kernel ? size",
        "j > size - kernel ? size", AV),
    cpu("rows_and_columns_exchanged", f"{WINDOWS}/cpu/rows.h",
        "t / w.x.kernel * row + t % w.x.kernel * pitch",
        "t % w.x.kernel * row + t / w.x.kernel * pitch", AV),
    cpu("tap_of_another_query", f"{WINDOWS}/cpu/rows.h", "x - l.start[q]]", "x - l.start[x]]", AV),
    cpu("wrong_sign", f"ops/{MIX}/contmix_cpu_scores.h", "(hw::load(dp + at + t) - d)",
        "(hw::load(dp + at + t) + d)", MIX),
    cpu("table_of_one_row", f"ops/{MIX}/contmix_cpu_scores.h",
        "sums + (w.y.first_offset(y) + a) *", "sums + (w.y.first_offset(0) + a) *", MIX),
    cpu("sums_of_one_part", f"ops/{MIX}/contmix_cpu.cpp", "part < parts_; ++part",
        "part < 1; ++part", MIX),
    simt("row_of_the_window_forgotten", f"{WINDOWS}/simt/tokens.cuh",
         "const Element* key = from + a * v.stride[1];", "const Element* key = from;", AV),
    simt("half_of_the_lanes", f"{WINDOWS}/simt/tokens.cuh", "int mask = p.lanes / 2;",
         "int mask = p.lanes / 4;", AV),
    simt("tap_of_another_query", f"{WINDOWS}/simt/tokens.cuh", "tap - line.start(x))",
         "tap - line.start(k.x))", AV),
    simt("missing_barrier", f"ops/{MIX}/contmix_simt_weights.cuh",
         "multiply(t);\n        dev::sync_block();", "multiply(t);", MIX),
    simt("weights_of_the_small_window", f"ops/{MIX}/contmix_simt_forward.cuh",
         "(m == 0 ? 0 : tile.small())", "0 * m", MIX),
    simt("token_of_the_first_row", f"ops/{MIX}/contmix_simt_gradients.cuh",
         "p.p(tile.b, tile.y(i), tile.x(i), tile.group,",
         "p.p(tile.b, tile.y(0), tile.x(i), tile.group,", MIX),
    simt("wrong_sign", f"ops/{MIX}/contmix_simt_gradients.cuh", "p[t] * (ds[t] - sum)",
         "p[t] * (ds[t] + sum)", MIX),
    simt("map_of_the_first_key", f"ops/{MIX}/contmix_simt_gradients.cuh",
         "static_cast<A>(p.weight(t, c))", "static_cast<A>(p.weight(0, c))", MIX),
    simt("sums_begun_again", f"ops/{MIX}/contmix_simt_gradients.cuh",
         "to = p.first ? sum[i] : to + sum[i];", "to = sum[i];", MIX),
    simt("window_off_by_one", f"ops/{MIX}/contmix_simt_gradients.cuh", "i < line.kernel)",
         "i < line.kernel - 1)", MIX),
    simt("sums_of_one_slice", f"ops/{MIX}/contmix_simt_gradients.cuh", "term < p.terms;",
         "term < 1;", MIX),
    cpu("group_not_added", f"{FILES}_cpu_window.h", "store(f + c, value + load(x + c))",
        "store(f + c, value)", CASCADE),
    cpu("taps_off_by_one", f"{FILES}_cpu_window.h", "std::max(-reach, -y)",
        "std::max(1 - reach, -y)", CASCADE),
    cpu("bias_not_mirrored", f"{FILES}_cpu_weights.h", "middle[dx] = middle[-dx] = value;",
        "middle[dx] = value;", CASCADE),
    cpu("padding_repeats", f"{FILES}_cpu.cpp", "inside ? token(s, y, x, copy) : zeros_.data()",
        "token(s, inside ? y : 0, inside ? x : 0, copy)", CASCADE),
    simt("missing_barrier", f"{FILES}_simt.cuh",
         "convolve(p, w, head);\n        dev::sync_block();", "convolve(p, w, head);", CASCADE),
    simt("group_not_added", f"{FILES}_simt.cuh", "o + x(p, w, i, (head + 1) * w.group + c)", "o",
         CASCADE),
    simt("distance_without_sign", f"{FILES}_simt.cuh", "(dy < 0 ? -dy : dy)", "(dy < 0 ? 0 : dy)",
         CASCADE),
    sm80("missing_wait", f"{FILES}_sm80.cuh",
         "dev::copy_async_wait<0>();\n      dev::sync_block();\n      project(",
         "dev::sync_block();\n      project(", CASCADE),
    sm80("missing_barrier", f"{FILES}_sm80.cuh",
         "convolve(p, smem, head);\n      dev::sync_block();", "convolve(p, smem, head);", CASCADE),
    sm80("weights_too_early", f"{FILES}_sm80.cuh",
         "project(p, smem, head);\n      dev::sync_block();", "project(p, smem, head);", CASCADE),
    sm80("windows_see_each_other", f"{FILES}_sm80.cuh", "key.window == row.window ?",
         "key.window >= 0 ?", CASCADE),
    sm80("group_not_added", f"{FILES}_sm80.cuh", "a += static_cast<float>(own[at * x.stride[3]]);",
         "", CASCADE),
    simt("padding_not_zero", f"{FILES}_simt.cuh", "return A(0);\n    return static_cast<A>(",
         "return A(1);\n    return static_cast<A>(", CASCADE),
)  # fmt: skip


class Sandbox:
    """A copy of the sources and its build in the quick preset."""

    def __init__(self, folder: Path):
        self.source, self.build = folder / "source", folder / "build"
        self.source.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.source / name)
        self.call(
            "cmake", "--preset", "dev", "-B", self.build, "-DHW_TESTS=OFF",
            f"-DHW_PYTHON_EXECUTABLE={sys.executable}",
        )  # fmt: skip
        self.compile()

    def call(self, *command) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(part) for part in command], cwd=self.source, text=True, timeout=900,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-4000:]
        return result

    def compile(self):
        jobs = str(os.cpu_count() or 1)
        self.call("cmake", "--build", self.build, "--target", "python_package", "-j", jobs)

    def check(self, fault: Fault) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CHECK, fault.operator, fault.backend, fault.dtype],
            cwd=ROOT / "tests", text=True, timeout=600, check=False,
            env=os.environ | {
                "HEADWORKS_LIBRARY_DIR": str(self.build / "lib"),
                "PYTHONPATH": str(ROOT / "python"),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def plant(self, fault: Fault) -> subprocess.CompletedProcess[str]:
        path = self.source / "csrc" / fault.file
        text = path.read_text()
        assert text.count(fault.right) == 1, f"{fault.right!r} occurs {text.count(fault.right)}x"
        try:
            path.write_text(text.replace(fault.right, fault.wrong))
            self.compile()
            return self.check(fault)
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("cmake and ninja are not on PATH")
    return Sandbox(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    "fault",
    list({(f.operator, f.backend): f for f in FAULTS}.values()),
    ids=lambda f: f"{f.operator}-{f.backend}",
)
def test_the_sources_as_they_are_pass(sandbox, fault):
    sandbox.compile()
    result = sandbox.check(fault)
    assert result.returncode == 0, result.stdout[-2000:]


def chosen(faults, share):
    first, step = (int(n) for n in share.split("/"))
    return faults[first::step]


PLANTED = chosen(FAULTS, os.environ.get("HEADWORKS_FAULTS", "0/1"))


@pytest.mark.parametrize("fault", PLANTED, ids=lambda f: f"{f.operator}-{f.backend}-{f.name}")
def test_a_planted_fault_is_caught(sandbox, fault):
    result = sandbox.plant(fault)
    assert result.returncode == WRONG, result.stdout[-2000:]
