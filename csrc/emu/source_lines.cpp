// SPDX-License-Identifier: Apache-2.0
#include "emu/source_lines.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include "core/error.h"

namespace hw::emu {
namespace {

constexpr size_t kMostFrames = 4;

struct Origin {
  std::string file;
  uintptr_t offset = 0;
};

std::string own_path() {
  std::array<char, 4096> path{};
  const ssize_t n = readlink("/proc/self/exe", path.data(), path.size());
  return std::string(path.data(), n > 0 ? static_cast<size_t>(n) : 0);
}

Origin origin_of(const void* return_address) {
  Dl_info info{};
  link_map* map = nullptr;
  if (dladdr1(return_address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) {
    return {};
  }
  // The program itself has no name in the link map.
  const std::string file = map->l_name[0] != '\0' ? map->l_name : own_path();
  return {file, reinterpret_cast<uintptr_t>(return_address) - 1 - map->l_addr};
}

std::string hex(uintptr_t x) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "0x%zx", static_cast<size_t>(x));
  return text.data();
}

// From the folder of the sources on: "core/gpu/tile.cuh:88", "tests/emu/races.cuh:12".
std::string shorten(std::string line) {
  line.resize(line.find_first_of(" \n") == line.npos ? line.size() : line.find_first_of(" \n"));
  for (const char* folder : {"csrc/", "tests/"}) {
    const size_t at = line.rfind(folder);
    if (at != line.npos) return line.substr(at + (folder[0] == 'c' ? 5 : 0));
  }
  return line;
}

// What addr2line prints: for each address a line "0x...", then the frames, innermost first.
std::vector<std::string> ask(const std::string& file, const std::vector<uintptr_t>& offsets) {
  std::string command = concat("addr2line -a -i -e '", file, "'");
  for (uintptr_t offset : offsets) command += " " + hex(offset);
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen((command + " 2>/dev/null").c_str(), "r"),
                                                   &pclose);
  std::vector<std::string> answers;
  std::array<char, 4096> line{};
  size_t frames = 0;
  while (pipe && std::fgets(line.data(), static_cast<int>(line.size()), pipe.get())) {
    if (line[0] == '0' && line[1] == 'x') {
      answers.emplace_back();
      frames = 0;
    } else if (!answers.empty() && line[0] != '?' && frames < kMostFrames) {
      const std::string frame = shorten(line.data());
      if (frame.starts_with("core/gpu/launch.h")) frames = kMostFrames;  // the kernel ends here
      if (frames < kMostFrames) answers.back() += (frames > 0 ? " in " : "") + frame;
      ++frames;
    }
  }
  return answers;
}

}  // namespace

std::vector<std::string> source_lines(const std::vector<const void*>& return_addresses) {
  std::vector<std::string> lines(return_addresses.size());
  std::map<std::string, std::vector<size_t>> of_file;
  for (size_t i = 0; i < lines.size(); ++i) {
    const Origin origin = origin_of(return_addresses[i]);
    lines[i] = concat(origin.file, "+", hex(origin.offset));
    of_file[origin.file].push_back(i);
  }
  for (const auto& [file, members] : of_file) {
    std::vector<uintptr_t> offsets;
    for (size_t i : members) offsets.push_back(origin_of(return_addresses[i]).offset);
    const std::vector<std::string> answers = ask(file, offsets);
    for (size_t i = 0; i < members.size() && i < answers.size(); ++i) {
      if (!answers[i].empty()) lines[members[i]] = answers[i];
    }
  }
  return lines;
}

}  // namespace hw::emu
