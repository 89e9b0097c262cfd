// SPDX-License-Identifier: Apache-2.0
// The counting sort behind index lists against std::stable_sort's idea of it. With nvcc (-x cu) the
// same file tests the device.
#include "buffer.h"
#include "check.h"
#include "orders.h"

#include "core/gpu/csr.cuh"

namespace hw::test {
namespace {

// Lists [batches, heads, items] of any strides.
struct Values {
  Ref<const int64_t, 3> x;
  HW_DEVICE HW_INLINE int64_t operator()(int64_t b, int64_t head, int64_t i) const {
    return x(b, head, i);
  }
};

using List = std::vector<int64_t>;

// Sorts the lists, which lie one after another, items `step` apart, and compares.
void check_lists(const std::vector<List>& lists, int64_t heads, int64_t buckets, int64_t step) {
  const int64_t items = static_cast<int64_t>(lists[0].size());
  const int64_t batches = static_cast<int64_t>(lists.size()) / heads;
  List memory(lists.size() * static_cast<size_t>(items * step), 12345);
  for (size_t l = 0; l < lists.size(); ++l)
    for (int64_t i = 0; i < items; ++i)
      memory[l * static_cast<size_t>(items * step) + static_cast<size_t>(i * step)] =
          lists[l][static_cast<size_t>(i)];
  const Buffer<int64_t> values(memory);
  const Ref<const int64_t, 3> x{
      values.data(), {batches, heads, items}, {heads * items * step, items * step, step}};

  Arena measure;
  csr_in(measure, batches, heads, buckets, items);
  const Buffer<uint8_t> memory_of_csr(static_cast<size_t>(measure.bytes()), uint8_t{0xcd});
  Arena given({memory_of_csr.data(), measure.bytes()}, "csr");
  const Csr csr = csr_in(given, batches, heads, buckets, items);
  make_csr(Values{x}, csr, context());

  const std::vector<uint8_t> made = memory_of_csr.read();
  const auto number = [&](const int32_t* at) {
    int32_t n;
    std::memcpy(&n, made.data() + (reinterpret_cast<const uint8_t*>(at) - memory_of_csr.data()),
                sizeof n);
    return static_cast<int64_t>(n);
  };
  for (int64_t l = 0; l < csr.lists(); ++l) {
    const List& list = lists[static_cast<size_t>(l)];
    EXPECT(csr.list(l / heads, l % heads) == l, "list ", l);
    int64_t place = 0;
    for (int64_t v = 0; v < buckets; ++v) {
      EXPECT(number(csr.begin_of(l) + v) == place, "list ", l, ", begin of ", v);
      for (int64_t i = 0; i < items; ++i) {
        if (list[static_cast<size_t>(i)] != v) continue;
        EXPECT(number(csr.items_of(l) + place) == i, "list ", l, ", place ", place);
        ++place;
      }
    }
    EXPECT(number(csr.begin_of(l) + buckets) == place, "list ", l, ": all");
  }
}

std::vector<List> drawn(size_t lists, size_t items, int64_t below, uint64_t seed) {
  Numbers numbers(seed);
  std::vector<List> made(lists, List(items));
  for (List& list : made)
    for (int64_t& x : list) x = numbers.bits() % static_cast<uint64_t>(below);
  return made;
}

TEST(csr_sizes) {
  for_all_orders([] {
    for (size_t items : {0, 1, 31, 32, 33, 511, 512, 513, 1100})
      check_lists(drawn(1, items, 7, items), 1, 7, 1);
    check_lists(drawn(6, 70, 40, 1), 3, 40, 1);
    check_lists(drawn(2, 65, 33, 2), 1, 33, 3);
  });
}

TEST(csr_buckets) {
  for (int64_t buckets : {1, 31, 32, 33, 511, 512, 513, 1500}) {
    const std::vector<List> lists = drawn(2, 300, buckets, static_cast<uint64_t>(buckets));
    check_lists(lists, 2, buckets, 1);
  }
  check_lists({List{}}, 1, 0, 1);
  check_lists({List(40, -1)}, 1, 0, 1);
}

TEST(csr_all_equal) {
  for_all_orders([] { check_lists({List(600, 4), List(600, 0), List(600, 9)}, 3, 10, 1); });
}

TEST(csr_values_outside) {
  for_all_orders([] {
    std::vector<List> lists = drawn(2, 200, 12, 3);
    for (List& list : lists)
      for (int64_t& x : list) x = x == 11 ? -1 : x == 10 ? int64_t{1} << 40 : x - 1;
    check_lists(lists, 1, 6, 1);
    check_lists({List(64, -1), List(64, 6), List(64, INT64_MIN)}, 1, 6, 1);
  });
}

TEST(csr_workspace) {
  Arena arena(Workspace{}, "some_operator");
  bool refused = false;
  try {
    csr_in(arena, 1, 1, 4, 4);
  } catch (const Error& error) {
    refused =
        std::string(error.what()).find("some_operator: workspace has 0 bytes") != std::string::npos;
  }
  EXPECT(refused, "a workspace that is too small");
}

}  // namespace
}  // namespace hw::test
