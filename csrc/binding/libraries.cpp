// SPDX-License-Identifier: Apache-2.0
#include "binding/libraries.h"

#include <optional>
#include <string>

#include <dlfcn.h>
#include <unistd.h>

namespace hw {
namespace {

constexpr std::string_view kEmulate = "emulate:";
#if defined(__APPLE__)
constexpr const char* kEmulatorFile = "libheadworks_emulator.dylib";
#else
constexpr const char* kEmulatorFile = "libheadworks_emulator.so";
#endif

const HwApi* checked(const HwApi* api, const char* library) {
  check(api != nullptr, ErrorKind::runtime, library, " and _C are of different versions; rebuild ",
        "headworks");
  return api;
}

// The folder of _C itself.
std::string own_folder() {
  Dl_info info;
  check(dladdr(reinterpret_cast<const void*>(&native_api), &info) != 0 && info.dli_fname,
        ErrorKind::runtime, "cannot find the folder of _C");
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

const HwApi* open_emulator() {
  const std::string path = own_folder() + "/" + kEmulatorFile;
  if (access(path.c_str(), R_OK) != 0)
    throw EmulatorMissing(
        ErrorKind::not_implemented,
        concat("this build has no emulator (", path, " is not there); build it with ",
               "HEADWORKS_PRESET=emu pip install -e ."));
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  check(library != nullptr, ErrorKind::runtime,
        "cannot load the emulator: ", library ? "" : dlerror());
  using Entry = const HwApi* (*)(int);
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "hw_api"));
  check(entry != nullptr, ErrorKind::runtime, path, " is not an emulator of headworks");
  return checked(entry(HW_API_VERSION), kEmulatorFile);
}

std::optional<int> backend_number(std::string_view name) {
  for (Backend b : {Backend::cpu, Backend::simt, Backend::sm80, Backend::sm90})
    if (name == backend_name(b)) return static_cast<int>(b);
  return std::nullopt;
}

}  // namespace

const HwApi& native_api() {
  static const HwApi* const api = checked(hw_api(HW_API_VERSION), "libheadworks");
  return *api;
}

const HwApi& emulator_api() {
  static const HwApi* const api = open_emulator();
  return *api;
}

Target target(std::string_view backend) {
  if (backend == "auto") return {&native_api(), kHwAutomatic, false};
  if (backend == "emulate") return {&emulator_api(), kHwAutomatic, true};
  const bool emulated = backend.starts_with(kEmulate);
  const auto number = backend_number(emulated ? backend.substr(kEmulate.size()) : backend);
  if (!number || (emulated && *number == static_cast<int>(Backend::cpu)))
    throw Error(ErrorKind::value,
                concat("backend is '", backend, "'; expected one of auto, reference, cpu, simt, ",
                       "sm80, sm90, emulate:simt, emulate:sm80"));
  return {emulated ? &emulator_api() : &native_api(), *number, emulated};
}

}  // namespace hw
