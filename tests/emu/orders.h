// SPDX-License-Identifier: Apache-2.0
// Repeating a test under every thread order and landing of copies; on a device it runs once.
#pragma once

#include <vector>

#include "core/gpu/device.cuh"

namespace hw::test {

#if defined(HW_EMULATE)

// The configurations that the tests go through; shuffled orders with a few seeds.
inline std::vector<emu::Config> all_configurations() {
  using emu::Copies;
  using emu::Order;
  std::vector<emu::Config> list;
  for (Copies copies : {Copies::late, Copies::early, Copies::mixed}) {
    list.push_back({0, Order::forward, copies});
    list.push_back({0, Order::reverse, copies});
    for (uint64_t seed : {1, 2, 3}) list.push_back({seed, Order::shuffled, copies});
  }
  return list;
}

// The same without the race check, for kernels that race on purpose.
inline emu::Config racing(emu::Config config) {
  config.races = emu::RaceCheck::off;
  return config;
}

template <class Body>
void for_all_orders(const Body& body) {
  for (const emu::Config& config : all_configurations()) {
    const emu::ScopedConfig scope(config);
    body();
  }
}

template <class Body>
void for_all_orders_of_a_race(const Body& body) {
  for (const emu::Config& config : all_configurations()) {
    const emu::ScopedConfig scope(racing(config));
    body();
  }
}

#else

template <class Body>
void for_all_orders(const Body& body) {
  body();
}

template <class Body>
void for_all_orders_of_a_race(const Body& body) {
  body();
}

#endif

}  // namespace hw::test
