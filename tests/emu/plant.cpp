// SPDX-License-Identifier: Apache-2.0
// Faults that only AddressSanitizer or UndefinedBehaviorSanitizer sees end the process, so they run
// in a child whose report is read.
#include "plant.h"

#include <cstdio>
#include <string>

#include <unistd.h>

#include "buffer.h"
#include "check.h"
#include "faults.cuh"
#if defined(HW_EMULATE)
#include "emu/fiber.h"
#endif

namespace hw::test {

#if defined(HW_EMULATE)

namespace {

constexpr int kSharedBytes = 128, kElements = 32;

template <class Kernel>
int run(int index) {
  const Buffer<float> out(kElements, 0.0f);
  launch<Kernel>({}, kSharedBytes, context(), {out.data(), index});
  return 0;
}

std::string own_path() {
  char path[4096];
  const ssize_t n = readlink("/proc/self/exe", path, sizeof(path));
  check(n > 0, ErrorKind::runtime, "cannot find the path of this program");
  return std::string(path, static_cast<size_t>(n));
}

// What the child that runs the planted fault prints, and its exit status.
struct Child {
  std::string output;
  int status = 0;
};

Child run_child(const std::string& fault) {
  Child child;
  FILE* pipe = popen(("'" + own_path() + "' --plant " + fault + " 2>&1").c_str(), "r");
  check(pipe != nullptr, ErrorKind::runtime, "cannot start a child");
  char buffer[4096];
  while (size_t n = std::fread(buffer, 1, sizeof(buffer), pipe)) child.output.append(buffer, n);
  child.status = pclose(pipe);
  return child;
}

void check_child(const std::string& fault, const std::vector<std::string>& parts) {
  if (!HW_EMU_ASAN) return note("not run: needs a build with AddressSanitizer");
  const Child child = run_child(fault);
  EXPECT(child.status != 0, "the child survived");
  for (const std::string& part : parts) {
    EXPECT(child.output.find(part) != std::string::npos, "for '", part, "' in: ", child.output);
  }
}

TEST(planted_shared_write_past_the_end) {
  check_child("shared_write", {"heap-buffer-overflow", "WRITE of size 4",
                               "faults.cuh:", "0 bytes to the right of 128-byte region"});
}
TEST(planted_shared_write_before_the_start) {
  check_child("shared_write_before", {"heap-buffer-overflow", "WRITE of size 4",
                                      "faults.cuh:", "4 bytes to the left of 128-byte region"});
}
TEST(planted_shared_read_past_the_end) {
  check_child("shared_read", {"heap-buffer-overflow", "READ of size 4", "faults.cuh:"});
}
TEST(planted_global_write_past_the_end) {
  check_child("global_write", {"heap-buffer-overflow", "WRITE of size 4", "faults.cuh:"});
}
TEST(planted_copy_from_past_the_end) {
  check_child("copy_from", {"heap-buffer-overflow", "READ of size 16", "faults.cuh:"});
}
TEST(planted_misaligned_store) {
  check_child("misaligned_store", {"runtime error", "misaligned address", "faults.cuh:"});
}

}  // namespace

int plant(const char* name) {
  const std::string fault = name;
  if (fault == "shared_write") return run<SharedWrite>(kSharedBytes / 4);
  if (fault == "shared_write_before") return run<SharedWrite>(-1);
  if (fault == "shared_read") return run<SharedRead>(kSharedBytes / 4);
  if (fault == "global_write") return run<GlobalWrite>(kElements);
  if (fault == "copy_from") return run<CopyFrom>(kElements);
  if (fault == "misaligned_store") return run<MisalignedStore>(1);
  std::printf("no fault is called %s\n", name);
  return 0;
}

#else

int plant(const char*) { return 0; }

#endif

}  // namespace hw::test
