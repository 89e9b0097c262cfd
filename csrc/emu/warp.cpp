// SPDX-License-Identifier: Apache-2.0
// What a warp does as one: each operation as a plain loop over the lanes' arguments. Fragment
// layouts are those at the top of core/gpu/mma.cuh.
#include <algorithm>
#include <cstring>

#include "emu/engine.h"

#include "core/dtype.h"

namespace hw::emu {
namespace {

// ---- Shuffles and votes -------------------------------------------------------------------------

struct ShuffleArguments {
  unsigned char* value;
  size_t size;
  int source;
};

void execute_shuffle(void* const* arguments, uint32_t live) {
  constexpr size_t kPiece = 16;
  const auto of = [&](int lane) { return static_cast<ShuffleArguments*>(arguments[lane]); };
  const size_t size = of(std::countr_zero(live))->size;
  const int poison = Engine::running().config().poison;
  for (size_t at = 0; at < size; at += kPiece) {
    const size_t n = std::min(kPiece, size - at);
    unsigned char before[kLanes][kPiece];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (live >> lane & 1u)
        std::memcpy(before[lane], of(lane)->value + at, n);
      else
        std::memset(before[lane], poison, n);
    }
    for (uint32_t rest = live; rest != 0; rest &= rest - 1) {
      const ShuffleArguments& a = *of(std::countr_zero(rest));
      std::memcpy(a.value + at, before[a.source], n);
    }
  }
}

struct BallotArguments {
  bool predicate;
  Votes votes;
};

void execute_ballot(void* const* arguments, uint32_t live) {
  const auto of = [&](uint32_t rest) {
    return static_cast<BallotArguments*>(arguments[std::countr_zero(rest)]);
  };
  Votes votes{0, live};
  for (uint32_t rest = live; rest != 0; rest &= rest - 1) {
    if (of(rest)->predicate) votes.yes |= rest & (0u - rest);
  }
  for (uint32_t rest = live; rest != 0; rest &= rest - 1) of(rest)->votes = votes;
}

void execute_nothing(void* const*, uint32_t) {}

// ---- Matrix loads -------------------------------------------------------------------------------

struct LoadMatrixArguments {
  uint32_t* regs;
  const void* row;
};

template <int kMatrices, bool kTransposed>
void execute_load_matrix(void* const* arguments, uint32_t) {
  const auto of = [&](int lane) { return static_cast<LoadMatrixArguments*>(arguments[lane]); };
  uint16_t m[kMatrices][8][8];
  for (int i = 0; i < kMatrices; ++i) {
    for (int r = 0; r < 8; ++r) std::memcpy(m[i][r], of(8 * i + r)->row, sizeof(m[i][r]));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kMatrices; ++i) {
      const uint32_t lo = kTransposed ? m[i][2 * t][g] : m[i][g][2 * t];
      const uint32_t hi = kTransposed ? m[i][2 * t + 1][g] : m[i][g][2 * t + 1];
      of(lane)->regs[i] = lo | hi << 16;
    }
  }
}

// ---- Matrix multiply-accumulate -----------------------------------------------------------------

struct MmaArguments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

float widen(bf16 x) { return static_cast<float>(x); }

// Exact: as a float with the half's exponent, times 2^112; infinities and NaN apart.
float widen(f16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(sign | scaled | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u));
}

template <class Element>
float half_of(uint32_t word, int which) {
  Element x;
  x.bits = static_cast<uint16_t>(word >> (16 * which));
  return widen(x);
}

// d[m, n] += sum_k a[m, k] b[k, n], k ascending; products of the narrow inputs are exact in fp32.
template <int kK>
void multiply(float (&d)[16][8], const float (&a)[16][kK], const float (&b)[kK][8]) {
  for (int m = 0; m < 16; ++m) {
    float sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = d[m][n];
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) d[m][n] = sum[n];
  }
}

// Where the accumulator's register i of a lane lies.
constexpr int d_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
constexpr int d_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

template <int kK, class Gather>
void execute_mma(void* const* arguments, const Gather& gather) {
  const auto of = [&](int lane) { return static_cast<MmaArguments*>(arguments[lane]); };
  float a[16][kK], b[kK][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    gather(lane, of(lane)->a, of(lane)->b, a, b);
    for (int i = 0; i < 4; ++i) d[d_row(lane, i)][d_column(lane, i)] = of(lane)->d[i];
  }
  multiply<kK>(d, a, b);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) of(lane)->d[i] = d[d_row(lane, i)][d_column(lane, i)];
  }
}

template <class Element>
void execute_mma_16(void* const* arguments, uint32_t) {
  execute_mma<16>(arguments, [](int lane, const uint32_t* ra, const uint32_t* rb,
                                float (&a)[16][16], float (&b)[16][8]) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = half_of<Element>(ra[i], e);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + e][g] = half_of<Element>(rb[i], e);
    }
  });
}

void execute_mma_tf32(void* const* arguments, uint32_t) {
  const auto read = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
  execute_mma<8>(arguments, [&](int lane, const uint32_t* ra, const uint32_t* rb, float (&a)[16][8],
                                float (&b)[8][8]) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = read(ra[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = read(rb[i]);
  });
}

}  // namespace

const WarpOperation kSyncBlock = {"sync_block", false, nullptr};
const WarpOperation kSyncGroup = {"sync_group", false, nullptr};
const WarpOperation kSyncWarp = {"sync_warp", false, &execute_nothing};
const WarpOperation kShuffle = {"shuffle", false, &execute_shuffle};
const WarpOperation kShuffleXor = {"shuffle_xor", false, &execute_shuffle};
const WarpOperation kShuffleUp = {"shuffle_up", false, &execute_shuffle};
const WarpOperation kShuffleDown = {"shuffle_down", false, &execute_shuffle};
const WarpOperation kBallot = {"ballot", false, &execute_ballot};
const WarpOperation kAny = {"any", false, &execute_ballot};
const WarpOperation kAll = {"all", false, &execute_ballot};
const WarpOperation kLoadMatrixX4 = {"load_matrix_x4", true, &execute_load_matrix<4, false>};
const WarpOperation kLoadMatrixX4Transposed = {"load_matrix_x4_transposed", true,
                                               &execute_load_matrix<4, true>};
const WarpOperation kLoadMatrixX2 = {"load_matrix_x2", true, &execute_load_matrix<2, false>};
const WarpOperation kLoadMatrixX2Transposed = {"load_matrix_x2_transposed", true,
                                               &execute_load_matrix<2, true>};
const WarpOperation kMmaBf16 = {"mma_bf16", true, &execute_mma_16<bf16>};
const WarpOperation kMmaF16 = {"mma_f16", true, &execute_mma_16<f16>};
const WarpOperation kMmaTf32 = {"mma_tf32", true, &execute_mma_tf32};

void execute(const WarpOperation& operation, void* arguments, Site site) {
  Engine::running().meet({&operation, 0, 0, site}, arguments);
}

void shuffle(const WarpOperation& operation, void* value, size_t size, int source, Site site) {
  ShuffleArguments arguments{static_cast<unsigned char*>(value), size, source};
  execute(operation, &arguments, site);
}

Votes ballot(const WarpOperation& operation, bool predicate, Site site) {
  BallotArguments arguments{predicate, {}};
  execute(operation, &arguments, site);
  return arguments.votes;
}

void load_matrix(const WarpOperation& operation, uint32_t* regs, const void* row, Site site) {
  const bool four = &operation == &kLoadMatrixX4 || &operation == &kLoadMatrixX4Transposed;
  if (four || current->index % kLanes < 16) {
    const Engine& engine = Engine::running();
    engine.require_shared(operation.name, row, 16, site);
    if (Races* const races = engine.races()) {
      races->access(current->index, row, 16, AccessKind::read, __builtin_return_address(0));
    }
  }
  LoadMatrixArguments arguments{regs, row};
  execute(operation, &arguments, site);
}

void mma(const WarpOperation& operation, float* d, const uint32_t* a, const uint32_t* b,
         Site site) {
  MmaArguments arguments{d, a, b};
  execute(operation, &arguments, site);
}

}  // namespace hw::emu
