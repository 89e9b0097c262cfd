// SPDX-License-Identifier: Apache-2.0
// Every primitive against a plain loop. With nvcc (-x cu) the same file tests the device.
#include <algorithm>
#include <limits>
#include <numeric>

#include "buffer.h"
#include "check.h"
#include "orders.h"
#include "primitives.cuh"

namespace hw::test {
namespace {

std::vector<float> uniform(size_t n, uint64_t seed) {
  Numbers numbers(seed);
  std::vector<float> values(n);
  for (float& v : values) v = numbers.uniform();
  return values;
}

TEST(coordinates) {
  const Grid grid{3, 2, 4};
  Buffer<int> out(3 * 2 * 4 * Coordinates::kThreads * Coordinates::kColumns, -1);
  launch<Coordinates>(grid, 0, context(), {out.data()});
  const std::vector<int> got = out.read();
  size_t at = 0;
  for (int z = 0; z < 4; ++z) {
    for (int y = 0; y < 2; ++y) {
      for (int x = 0; x < 3; ++x) {
        for (int t = 0; t < Coordinates::kThreads; ++t) {
          for (int want : {t, t % 32, t / 32, x, y, z, 3, 2, 4}) {
            EXPECT(got[at] == want, "thread ", t, ": ", got[at], " for ", want);
            ++at;
          }
        }
      }
    }
  }
}

bool same(float a, float b) { return a == b; }
bool same(double a, double b) { return a == b; }
bool same(bf16 a, bf16 b) { return a.bits == b.bits; }
bool same(const Triple& a, const Triple& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

template <class T>
void check_shuffles(const std::vector<T>& in, int source, int mask, int shift) {
  using Kernel = Shuffles<T>;
  const Buffer<T> values(in), out(Kernel::kThreads * Kernel::kColumns, in[0]);
  launch<Kernel>({}, 0, context(), {values.data(), out.data(), source, mask, shift});
  const std::vector<T> got = out.read();
  for (int t = 0; t < Kernel::kThreads; ++t) {
    const int lane = t % 32, base = t - lane;
    const int from[] = {(lane + source) % 32, lane ^ mask, lane < shift ? lane : lane - shift,
                        lane + shift > 31 ? lane : lane + shift};
    for (int c = 0; c < Kernel::kColumns; ++c) {
      EXPECT(same(got[t * Kernel::kColumns + c], in[base + from[c]]), "thread ", t, " column ", c);
    }
  }
}

TEST(shuffles) {
  for_all_orders([] {
    Numbers numbers(1);
    std::vector<float> f(64);
    std::vector<double> d(64);
    std::vector<bf16> h(64);
    std::vector<Triple> s(64);
    for (int i = 0; i < 64; ++i) {
      f[i] = numbers.uniform();
      d[i] = numbers.uniform() + 1e-12 * i;
      h[i] = bf16(numbers.uniform());
      s[i] = {numbers.uniform(), i, numbers.bits()};
    }
    check_shuffles(f, 0, 1, 1);
    check_shuffles(f, 37, 16, 31);
    check_shuffles(d, 5, 31, 7);
    check_shuffles(h, 31, 3, 0);
    check_shuffles(s, 1, 21, 13);
  });
}

template <int kThreads>
void check_votes() {
  using Kernel = Votes<kThreads>;
  for (uint32_t pattern : {0u, 0xffffffffu, 0x80000001u, 0x0f0f1234u}) {
    std::vector<int> in(kThreads);
    for (int t = 0; t < kThreads; ++t) in[t] = pattern >> (t % 32) & 1u ? 7 : 0;
    const Buffer<int> predicates(in);
    const Buffer<uint32_t> out(kThreads * Kernel::kColumns, 99u);
    launch<Kernel>({}, 0, context(), {predicates.data(), out.data()});
    const std::vector<uint32_t> got = out.read();
    for (int t = 0; t < kThreads; ++t) {
      const int lanes = std::min(32, kThreads - t / 32 * 32);
      const uint32_t there = 0xffffffffu >> (32 - lanes), yes = pattern & there;
      EXPECT(got[3 * t] == yes, "thread ", t, ": ballot ", got[3 * t], " for ", yes);
      EXPECT(got[3 * t + 1] == (yes != 0 ? 1u : 0u), "thread ", t, ": any");
      EXPECT(got[3 * t + 2] == (yes == there ? 1u : 0u), "thread ", t, ": all");
    }
  }
}

TEST(votes) {
  for_all_orders([] {
    check_votes<64>();
    check_votes<48>();  // a warp of 16 lanes
    check_votes<1>();
  });
}

template <class T>
void check_reductions(const std::vector<T>& in, double tolerance) {
  using Kernel = Reductions<T>;
  const Buffer<T> values(in), out(Kernel::kThreads * Kernel::kColumns, T(0));
  launch<Kernel>({}, 0, context(), {values.data(), out.data()});
  const std::vector<T> got = out.read();
  const int widths[] = {32, 8, 4};
  for (int t = 0; t < Kernel::kThreads; ++t) {
    for (int i = 0; i < 3; ++i) {
      const auto begin = in.begin() + t / widths[i] * widths[i], end = begin + widths[i];
      const T* row = got.data() + t * Kernel::kColumns + 2 * i;
      expect_near(static_cast<double>(row[0]), std::accumulate(begin, end, 0.0), tolerance, "sum");
      EXPECT(row[1] == *std::max_element(begin, end), "maximum in thread ", t);
      const T* first = got.data() + t / widths[i] * widths[i] * Kernel::kColumns + 2 * i;
      EXPECT(row[0] == first[0], "thread ", t, " has other bits than the first of its group");
    }
  }
}

TEST(reductions) {
  for_all_orders([] {
    const std::vector<float> f = uniform(64, 2);
    check_reductions(f, 1e-5);
    check_reductions(std::vector<double>(f.begin(), f.end()), 1e-14);
    std::vector<int> i(64);
    for (int t = 0; t < 64; ++t) i[t] = t * 37 % 101 - 50;
    check_reductions(i, 0);
  });
}

TEST(reduction_ignores_nan_in_maximum) {
  std::vector<float> in(64, -1.0f);
  in[5] = std::numeric_limits<float>::quiet_NaN();
  using Kernel = Reductions<float>;
  const Buffer<float> values(in), out(Kernel::kThreads * Kernel::kColumns, 0.0f);
  launch<Kernel>({}, 0, context(), {values.data(), out.data()});
  const std::vector<float> got = out.read();
  for (int t = 0; t < 32; ++t) {
    EXPECT(std::isnan(got[t * Kernel::kColumns]), "the sum carries the NaN");
    EXPECT(got[t * Kernel::kColumns + 1] == -1.0f, "the maximum does not");
  }
}

TEST(exited_lanes_are_not_waited_for) {
  for_all_orders([] {
    const Buffer<uint32_t> out(ExitedLanes::kThreads, 7u);
    launch<ExitedLanes>({}, 0, context(), {out.data()});
    const std::vector<uint32_t> got = out.read();
    for (int t = 0; t < ExitedLanes::kThreads; ++t) {
      const uint32_t want = t % 2 == 0 ? 0x55555555u : 7u;
      EXPECT(got[t] == want, "thread ", t, ": ", got[t]);
    }
  });
}

TEST(exited_warps_are_not_waited_for) {
  for_all_orders([] {
    for (int index : {0, 1, 2}) {
      const Buffer<uint32_t> out(ExitedWarp::kThreads, 0u);
      launch<ExitedWarp>({}, 0, context(), {out.data(), index});
      const std::vector<uint32_t> got = out.read();
      for (int t = 0; t < ExitedWarp::kThreads; ++t) {
        EXPECT(got[t] == (t / 32 == index ? 0u : 1u), "thread ", t, " without warp ", index);
      }
    }
  });
}

TEST(block_barrier) {
  for_all_orders([] {
    const std::vector<float> in = uniform(3 * 128, 3);
    for (int rounds : {1, 2, 5}) {
      const Buffer<float> values(in), out(in.size(), 0.0f);
      launch<ReverseBlock>({3}, 128 * 4, context(), {values.data(), out.data(), rounds});
      const std::vector<float> got = out.read();
      for (int i = 0; i < 3 * 128; ++i) {
        const int from = rounds % 2 == 0 ? i : i / 128 * 128 + 127 - i % 128;
        EXPECT(got[i] == in[from], "element ", i);
      }
    }
  });
}

TEST(warp_barrier) {
  for_all_orders([] {
    const std::vector<float> in = uniform(64, 4);
    const Buffer<float> values(in), out(64, 0.0f);
    launch<ReverseWarp>({}, 64 * 4, context(), {values.data(), out.data()});
    const std::vector<float> got = out.read();
    for (int t = 0; t < 64; ++t) EXPECT(got[t] == in[t ^ 31], "thread ", t);
  });
}

TEST(group_barriers_are_apart) {
  for_all_orders([] {
    std::vector<float> in(128);
    std::iota(in.begin(), in.end(), 0.0f);
    const int rounds = 3;
    const Buffer<float> values(in), out(128, 0.0f);
    launch<Groups>({}, 128 * 4, context(), {values.data(), out.data(), rounds});
    const std::vector<float> got = out.read();
    const auto sum = [&](int t) {
      float s = 0;
      for (int i = 0; i < rounds * (t / 64 + 1); ++i) {
        s += in[t / 64 * 64 + (t + 33) % 64] + static_cast<float>(i);
      }
      return s;
    };
    for (int t = 0; t < 128; ++t) {
      EXPECT(got[t] == sum(t) + sum((t + 64) % 128), "thread ", t, ": ", got[t]);
    }
  });
}

TEST(producer_and_consumer) {
  for_all_orders([] {
    const std::vector<float> in = uniform(5 * 32, 5);
    const Buffer<float> values(in), out(in.size(), 0.0f);
    launch<ProducerConsumer>({}, 32 * 4, context(), {values.data(), out.data()});
    const std::vector<float> got = out.read();
    for (int i = 0; i < 5 * 32; ++i) EXPECT(got[i] == in[i ^ 31], "element ", i);
  });
}

TEST(atomics) {
  for_all_orders([] {
    const int blocks = 4, threads = Tickets::kThreads;
    for (int workers : {1, 2}) {
      const Buffer<int> counter(1, 0), global(blocks * threads, -1);
      const Buffer<unsigned long long> counter8(1, 0ull);
      const Buffer<unsigned> shared(blocks * threads, 77u);
      launch<Tickets>({blocks}, 4, context(workers),
                      {counter.data(), counter8.data(), global.data(), shared.data()});
      std::vector<int> tickets = global.read();
      std::sort(tickets.begin(), tickets.end());
      for (int i = 0; i < blocks * threads; ++i) EXPECT(tickets[i] == i, "ticket ", i);
      std::vector<unsigned> block_tickets = shared.read();
      for (int b = 0; b < blocks; ++b) {
        const auto begin = block_tickets.begin() + b * threads;
        std::sort(begin, begin + threads);
        for (int i = 0; i < threads; ++i) EXPECT(begin[i] == unsigned(i), "ticket ", i);
      }
      EXPECT(counter.read()[0] == blocks * threads);
      EXPECT(counter8.read()[0] == 3000000000ull * blocks * threads);
    }
  });
}

TEST(fast_maths) {
  const float inf = std::numeric_limits<float>::infinity(), subnormal = 1e-40f;
  std::vector<float> in = {0.0f,   -0.0f,   inf,  -inf, subnormal, -subnormal,
                           127.5f, -126.5f, 1.0f, 2.0f, 0.5f,      std::nanf("")};
  Numbers numbers(6);
  while (in.size() < 32) in.push_back(20.0f * std::fabs(numbers.uniform()) + 1e-3f);
  const Buffer<float> values(in), out(32 * FastMaths::kColumns, 0.0f);
  launch<FastMaths>({}, 0, context(), {values.data(), out.data()});
  const std::vector<float> got = out.read();
  for (int t = 0; t < 32; ++t) {
    const auto flushed = [](float x) {
      return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
    };
    const float x = flushed(in[t]);
    const float reciprocal = x == 0 ? std::copysign(inf, x) : 1.0f / x;
    const float root = x == 0 ? std::copysign(inf, x) : 1.0f / std::sqrt(x);
    const float want[] = {flushed(std::exp2(x)), reciprocal, root, std::log2(x)};
    for (int c = 0; c < 4; ++c) {
      expect_near(got[4 * t + c], want[c], std::fabs(want[c]) * 4e-7 + (c == 3 ? 1e-7 : 0),
                  concat("function ", c, " of ", in[t]));
    }
  }
}

TEST(packing) {
  std::vector<float> in = {0.0f, 1.0f, -2.5f, 65504.0f, 1.00390625f, 3.0e38f, 6.0e-8f, -1.0e-3f};
  Numbers numbers(7);
  while (in.size() < 64) in.push_back(numbers.uniform());
  const Buffer<float> values(in);
  const Buffer<uint32_t> out(32 * Packing::kColumns, 0u);
  launch<Packing>({}, 0, context(), {values.data(), out.data()});
  const std::vector<uint32_t> got = out.read();
  for (int t = 0; t < 32; ++t) {
    const float lo = in[2 * t], hi = in[2 * t + 1];
    EXPECT(got[2 * t] == (uint32_t{bf16(lo).bits} | uint32_t{bf16(hi).bits} << 16), "bf16 ", t);
    EXPECT(got[2 * t + 1] == (uint32_t{f16(lo).bits} | uint32_t{f16(hi).bits} << 16), "f16 ", t);
  }
}

template <int kBytes>
void check_valid_bytes() {
  using Kernel = ValidBytes<kBytes>;
  std::vector<unsigned char> in(Kernel::kThreads * kBytes);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(1 + i % 251);
  const Buffer<unsigned char> values(in), out(in.size(), 0xee);
  launch<Kernel>({}, Kernel::kThreads * kBytes, context(), {values.data(), out.data()});
  const std::vector<unsigned char> got = out.read();
  for (int t = 0; t < Kernel::kThreads; ++t) {
    for (int i = 0; i < kBytes; ++i) {
      const int at = t * kBytes + i, want = i < t % (kBytes + 1) ? in[at] : 0;
      EXPECT(got[at] == want, "copy of ", kBytes, " bytes, thread ", t, ", byte ", i);
    }
  }
}

TEST(asynchronous_copies_fill_with_zero) {
  for_all_orders([] {
    check_valid_bytes<4>();
    check_valid_bytes<8>();
    check_valid_bytes<16>();
  });
}

// What a wait promises holds on any device; the rest depends on when copies land.
TEST(asynchronous_copies_land_in_order) {
  using Kernel = CopyGroups;  // reads before the waits on purpose
  for_all_orders_of_a_race([] {
    std::vector<int> in(Kernel::kThreads * Kernel::kGroups);
    std::iota(in.begin(), in.end(), 100);
    const Buffer<int> values(in), out(in.size() * Kernel::kWaits, 0);
    launch<Kernel>({}, Kernel::kThreads * Kernel::kGroups * 4, context(),
                   {values.data(), out.data()});
    const std::vector<int> got = out.read();
    for (int t = 0; t < Kernel::kThreads; ++t) {
      for (int w = 0; w < Kernel::kWaits; ++w) {
        for (int i = 0; i < Kernel::kGroups; ++i) {
          const int value = got[(t * Kernel::kWaits + w) * Kernel::kGroups + i];
          const int source = in[t * Kernel::kGroups + i];
          EXPECT(value == source || value == -1, "thread ", t, ": ", value);
          if (i < w) EXPECT(value == source, "group ", i, " after wait<", 3 - w, ">");
#if defined(HW_EMULATE)
          const emu::Copies copies = emu::config().copies;
          if (copies == emu::Copies::early) EXPECT(value == source, "early: lands at once");
          if (copies == emu::Copies::late && i >= w) EXPECT(value == -1, "late: not before");
#endif
        }
      }
    }
  });
}

}  // namespace
}  // namespace hw::test
