// SPDX-License-Identifier: Apache-2.0
// The asynchronous copies that one thread has under way: a queue of copies, cut into groups.
//
//   issued -> open group -> commit() closes it -> wait(n) lands all closed groups but the n latest
//
// A copy whose landing is late reads its source and writes its destination when its group lands.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace hw::emu {

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;  // the first `valid` are read, the others become zero

  void land() const {
    if (valid > 0) std::memcpy(to, from, static_cast<size_t>(valid));
    if (valid < bytes) {
      std::memset(static_cast<char*>(to) + valid, 0, static_cast<size_t>(bytes - valid));
    }
  }
};

class CopyQueue {
 public:
  void issue(const Copy& copy) { copies_.push_back(copy); }
  void commit() { ends_.push_back(copies_.size()); }

  void wait(size_t under_way) {
    while (ends_.size() - first_group_ > under_way) {
      const size_t end = ends_[first_group_++];
      for (; landed_ < end; ++landed_) copies_[landed_].land();
    }
    if (landed_ == copies_.size() && first_group_ == ends_.size()) clear();
  }

  // Drops what is under way: at the end of a thread, copies that nobody waited for never land.
  void clear() {
    copies_.clear();
    ends_.clear();
    landed_ = first_group_ = 0;
  }

 private:
  std::vector<Copy> copies_;
  std::vector<size_t> ends_;  // of the closed groups, as positions in copies_
  size_t landed_ = 0, first_group_ = 0;
};

}  // namespace hw::emu
