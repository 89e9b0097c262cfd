// SPDX-License-Identifier: Apache-2.0
#include "core/host/api.h"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/host/cpu_features.h"
#include "core/host/cuda_device.h"
#include "core/host/tables.h"

#if defined(HW_EMULATE)
#include "emu/emulator.h"
#endif

namespace hw {
namespace {

void write(HwMessage message, std::string_view text) {
  if (message.size == 0) return;
  const size_t n = text.size() < message.size ? text.size() : message.size - 1;
  std::memcpy(message.text, text.data(), n);
  message.text[n] = '\0';
}

// Runs f; what it throws becomes a status and a message.
template <class F>
int guarded(HwMessage message, const F& f) noexcept {
  try {
    f();
    return static_cast<int>(ErrorKind::none);
  } catch (const Error& e) {
    write(message, e.what());
    return static_cast<int>(e.kind());
  } catch (const std::bad_alloc&) {
    write(message, "headworks: out of memory");
  } catch (const std::exception& e) {
    write(message, e.what());
  } catch (...) {
    write(message, "headworks: unknown error in native code");
  }
  return static_cast<int>(ErrorKind::runtime);
}

Call as_call(const HwArguments& a) {
  return {{a.tensors, static_cast<size_t>(a.num_tensors)},
          {a.scalars, static_cast<size_t>(a.num_scalars)},
          a.context,
          DType::f32,
          {}};
}

std::optional<Backend> wanted(int backend) {
  if (backend == kHwAutomatic) return std::nullopt;
  check(backend >= 0 && backend <= static_cast<int>(Backend::sm90), ErrorKind::value,
        "there is no backend number ", backend);
  return static_cast<Backend>(backend);
}

Backend named(int backend) {
  const std::optional<Backend> b = wanted(backend);
  check(b.has_value(), ErrorKind::value, "this question needs a backend by name");
  return *b;
}

bool describe_function(int number, HwFunction* f) {
  if (number < 0 || number >= num_functions()) return false;
  const FunctionId id = function_by_number(number);
  write({f->name, sizeof f->name}, id.name());
  f->arguments = id.function().list.data();
  f->num_arguments = static_cast<int32_t>(id.function().list.size());
  return true;
}

int call(int function, int backend, const HwArguments* a, HwMessage message) {
  return guarded(message, [&] {
    Reading r(function_by_number(function), as_call(*a));
    const EntryPoint& entry = prepare(r, wanted(backend), {a->allocate, a->self});
    entry.run(r.params, r.call);
  });
}

int choose_backend(int function, int backend, const HwArguments* a, int* chosen,
                   HwMessage message) {
  return guarded(message, [&] {
    *chosen = static_cast<int>(choose(function_by_number(function), wanted(backend), as_call(*a)));
  });
}

int explain(int function, int backend, const HwArguments* a, HwMessage message) {
  return guarded(message, [&] {
    write(message, why_not(function_by_number(function), named(backend), as_call(*a)));
  });
}

int name_instance(int function, int backend, const HwArguments* a, HwMessage message) {
  return guarded(message, [&] {
    write(message, instance_name(function_by_number(function), named(backend), as_call(*a)));
  });
}

int workspace_bytes(int function, int backend, const HwArguments* a, int64_t* bytes,
                    HwMessage message) {
  return guarded(message, [&] {
    *bytes = workspace(function_by_number(function), named(backend), as_call(*a));
  });
}

#if defined(HW_EMULATE)

template <class Enum, size_t kCount>
Enum one_of(const char* key, std::string_view value, const char* const (&names)[kCount]) {
  std::string list;
  for (size_t i = 0; i < kCount; ++i) {
    if (value == names[i]) return static_cast<Enum>(i);
    list += (i ? ", " : "") + std::string(names[i]);
  }
  throw Error(ErrorKind::value,
              concat("emulator: ", key, " is '", value, "'; expected one of ", list));
}

int number(std::string_view key, std::string_view value, int least) {
  int parsed = 0;
  const char* const end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, parsed);
  check(error == std::errc{} && stop == end && parsed >= least, ErrorKind::value, "emulator: ", key,
        " is '", value, "'; expected a number from ", least, " on");
  return parsed;
}

void set_schedule(emu::Config config, std::string_view key, const char* value) {
  if (key == "seed")
    config.seed = std::strtoull(value, nullptr, 10);
  else if (key == "order")
    config.order = one_of<emu::Order>("order", value, {"forward", "reverse", "shuffled"});
  else if (key == "copies")
    config.copies = one_of<emu::Copies>("copies", value, {"late", "early", "mixed"});
  else if (key == "races")
    config.races = one_of<emu::RaceCheck>("races", value, {"on", "strict", "off"});
  else
    throw Error(ErrorKind::value, concat("the emulator has no setting '", key, "'"));
  emu::configure(config);
}

void set(std::string_view key, const char* value) {
  CudaDevice device = cuda_device(0);
  if (key == "capability")
    device.capability = number(key, value, 75);
  else if (key == "multiprocessors")
    device.multiprocessors = number(key, value, 1);
  else if (key == "shared_bytes")
    device.shared_bytes_per_block = number(key, value, 0);
  else
    return set_schedule(emu::config(), key, value);
  emulate_cuda_device(device);
}

#else

void set(std::string_view key, const char* value) {
  check(key == "cpu_isa", ErrorKind::value, "headworks has no setting '", key, "'");
  set_cpu_isa(value, "cpu_isa");
}

#endif

size_t info(char* text, size_t size) {
  static const int kNoMessage = 0;
  std::string description;
  if (guarded({nullptr, 0}, [&] { description = describe_library(); }) != kNoMessage) return 0;
  if (size > description.size()) write({text, size}, description);
  return description.size();
}

int configure(const char* key, const char* value, HwMessage message) {
  return guarded(message, [&] { set(key, value); });
}

constexpr HwApi kApi = {HW_API_VERSION, &describe_function, &call, &choose_backend, &explain,
                        &name_instance, &workspace_bytes,   &info, &configure};

}  // namespace
}  // namespace hw

extern "C" const HwApi* hw_api(int version) {
  return version == HW_API_VERSION ? &hw::kApi : nullptr;
}
