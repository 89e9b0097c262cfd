// SPDX-License-Identifier: Apache-2.0
// The random numbers of the emulator: splitmix64, one stream per block, so that a run depends on
// the seed only and not on how blocks are spread over host threads.
#pragma once

#include <bit>
#include <cstdint>

namespace hw::emu {

class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : state_(seed * 0x9e3779b97f4a7c15u + stream) { next(); }

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // One of n cases in `n`: true with probability 1 / n.
  bool one_in(uint64_t n) { return next() % n == 0; }

  // The index of some set bit; nearly uniform, which is enough to vary an order.
  int pick_bit(uint32_t mask) {
    const int turn = static_cast<int>(next() % 32);
    return (std::countr_zero(std::rotr(mask, turn)) + turn) % 32;
  }

 private:
  uint64_t state_;
};

}  // namespace hw::emu
