// SPDX-License-Identifier: Apache-2.0
// Dispatch: from a call to the instance that runs it, or to the reasons why none can.
//
//   candidates of a call    CUDA tensors: sm90, sm80, simt      CPU tensors: cpu
//   in the emulator         CPU tensors: sm80, simt (the CUDA kernels on the host)
//   a candidate is refused  for its device, dtype, dim, device capability, then by its operator
#include <vector>

#include "build_config.h"

#include "core/host/cpu_features.h"
#include "core/host/cuda_device.h"
#include "core/host/tables.h"

namespace hw {
namespace {

#if defined(HW_EMULATE)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

constexpr Backend kGpuBackends[] = {Backend::sm90, Backend::sm80, Backend::simt};
constexpr Backend kCpuBackends[] = {Backend::cpu};

std::string public_name(Backend b) {
  return (kEmulated ? "emulate:" : "") + std::string(backend_name(b));
}

const std::vector<FunctionId>& functions() {
  static const std::vector<FunctionId> all = [] {
    std::vector<FunctionId> list;
    for (const Operator* op : operators())
      for (int i = 0; i < static_cast<int>(op->functions.size()); ++i) list.push_back({op, i});
    return list;
  }();
  return all;
}

// The instances of one operator: neighbours in the table.
std::span<const Instance> instances_of(const Operator* op) {
  const std::span<const Instance> all = instances();
  size_t first = 0;
  while (first < all.size() && all[first].op != op) ++first;
  size_t last = first;
  while (last < all.size() && all[last].op == op) ++last;
  return all.subspan(first, last - first);
}

// ---- what was built ----

bool serves(const Instance& i, Backend b, DType t) { return i.backend == b && i.dtype == t; }

// On the CPU the strongest instruction set up to the one in use; on a GPU the smallest dim that
// holds the call's.
const Instance* find_instance(const Reading& r, Backend b) {
  const Isa isa = b == Backend::cpu ? cpu_isa() : Isa::none;
  const int dim = b == Backend::cpu ? 0 : r.dim(b);
  const Instance* best = nullptr;
  for (const Instance& i : instances_of(r.id.op)) {
    if (!serves(i, b, r.call.element) || i.isa > isa) continue;
    if (i.dim != 0 && i.dim < dim) continue;
    const bool better = !best || i.isa > best->isa || (i.dim != 0 && i.dim < best->dim);
    if (better) best = &i;
  }
  return best;
}

const EntryPoint& entry_of(const Instance& i, FunctionId f) {
  return i.table->entries[static_cast<size_t>(f.index)];
}

std::string built_dtypes(FunctionId f, Backend b) {
  std::string text;
  for (DType t : {DType::f64, DType::f32, DType::bf16, DType::f16})
    for (const Instance& i : instances_of(f.op))
      if (serves(i, b, t)) {
        text += (text.empty() ? "" : ", ") + std::string(dtype_name(t));
        break;
      }
  return text;
}

std::string built_dims(FunctionId f, Backend b, DType t) {
  std::string text;
  for (const Instance& i : instances_of(f.op))
    if (serves(i, b, t)) text += (text.empty() ? "" : ", ") + std::to_string(i.dim);
  return text;
}

const char* built_archs(Backend b) {
  switch (b) {
    case Backend::simt: return HW_CUDA_ARCHS_SIMT;
    case Backend::sm80: return HW_CUDA_ARCHS_SM80;
    case Backend::sm90: return HW_CUDA_ARCHS_SM90;
    case Backend::cpu: break;
  }
  return "";
}

int least_capability(Backend b) {
  switch (b) {
    case Backend::simt: return 75;
    case Backend::sm80: return 80;
    case Backend::sm90: return 90;
    case Backend::cpu: break;
  }
  return 0;
}

// ---- reasons ----

std::string refuse_device(Backend b, Device device) {
  if (b == Backend::cpu && device == Device::cuda) return "the tensors are on a CUDA device";
  if (device == Device::other) return "the tensors are neither on the CPU nor on a CUDA device";
  if (b == Backend::cpu || kEmulated)
    return device == Device::cpu ? "" : "the emulator takes tensors on the CPU";
  if (!HW_CUDA_FOUND) return "this build has no CUDA code (" HW_CUDA_REASON ")";
  if (device == Device::cpu)
    return concat("the tensors are on the CPU; move them to a CUDA device, or ask for 'emulate:",
                  backend_name(b), "'");
  return {};
}

// Why find_instance found none.
std::string explain_absence(const Reading& r, Backend b) {
  const std::string dtypes = built_dtypes(r.id, b);
  if (dtypes.empty())
    return concat("this build has no ", public_name(b), " code for ", r.id.op->name);
  const std::string dims = built_dims(r.id, b, r.call.element);
  if (dims.empty())
    return concat("no ", dtype_name(r.call.element), " (this build has ", dtypes, ")");
  return concat("no dim ", r.dim(b), " (this build has ", dims, ")");
}

std::string refuse_build(const Reading& r, Backend b) {
  const Instance* instance = find_instance(r, b);
  if (!instance) return explain_absence(r, b);
  if (!entry_of(*instance, r.id).run)
    return concat("there is no ", public_name(b), " kernel for ", r.id.name());
  return {};
}

std::string refuse_capability(Backend b, int device_index) {
  if (b == Backend::cpu) return {};
  const int capability = cuda_device(device_index).capability;
  if (kEmulated) {
    const int least = least_capability(b);
    if (capability >= least) return {};
    return concat("the emulated device is sm_", capability, ", and the code is for sm_", least);
  }
  if (archs_cover(built_archs(b), capability)) return {};
  return concat("the device is sm_", capability, ", and the code was built for ", built_archs(b));
}

std::string refuse(const Reading& r, Backend b) {
  std::string reason = refuse_device(b, r.first().device);
  if (reason.empty()) reason = refuse_build(r, b);
  if (reason.empty()) reason = refuse_capability(b, r.first().device_index);
  if (reason.empty()) reason = r.id.function().why_not(r.params, r.call, b);
  return reason;
}

std::string list_reasons(const Reading& r, std::span<const Backend> candidates) {
  std::string text = r.id.name() + ": no backend can take this call";
  for (Backend b : candidates) text += concat("\n  ", public_name(b), ": ", refuse(r, b));
  return text;
}

Backend choose(const Reading& r, std::optional<Backend> wanted) {
  if (wanted) {
    const std::string reason = refuse(r, *wanted);
    if (reason.empty()) [[likely]]
      return *wanted;
    throw Error(ErrorKind::not_implemented, concat(r.id.name(), ": backend '", public_name(*wanted),
                                                   "' cannot take this call: ", reason));
  }
  const bool gpu = kEmulated || r.first().device == Device::cuda;
  const std::span<const Backend> candidates =
      gpu ? std::span<const Backend>(kGpuBackends) : std::span<const Backend>(kCpuBackends);
  for (Backend b : candidates)
    if (refuse(r, b).empty()) return b;
  throw Error(ErrorKind::not_implemented, list_reasons(r, candidates));
}

// ---- running ----

void check_data(const Reading& r) {
  size_t tensor = 0;
  for (const Argument& a : r.id.function().list) {
    if (!a.is_tensor()) continue;
    const Tensor& t = r.call.tensors[tensor++];
    if (!t.present() || t.data != nullptr || t.numel() == 0) continue;
    throw Error(ErrorKind::runtime,
                concat(r.id.name(), ": ", a.name, " has no data. It is a fake or meta tensor; run ",
                       "the function on real tensors, or under torch.compile, which uses shapes ",
                       "alone"));
  }
}

// The device of a call to a CUDA backend.
void describe_device(Call& call) {
  call.context.device_index = call.tensors[0].device_index;
  call.context.multiprocessors = cuda_device(call.context.device_index).multiprocessors;
}

int64_t workspace_bytes(const Reading& r, Backend b) {
  return b == Backend::cpu ? 0 : r.id.function().workspace(r.params, r.call, b);
}

void take_workspace(Reading& r, Backend b, const Allocator& allocator) {
  const int64_t bytes = workspace_bytes(r, b);
  if (bytes == 0) return;
  void* const data = allocator.allocate ? allocator.allocate(allocator.self, bytes) : nullptr;
  check(data != nullptr, ErrorKind::runtime, r.id.name(), ": no memory for a workspace of ", bytes,
        " bytes");
  r.call.workspace = {data, bytes};
}

}  // namespace

std::string FunctionId::name() const { return concat(op->name, ".", function().name); }

int num_functions() { return static_cast<int>(functions().size()); }

FunctionId function_by_number(int number) {
  check(number >= 0 && number < num_functions(), ErrorKind::value, "there is no function number ",
        number);
  return functions()[static_cast<size_t>(number)];
}

std::string why_not(FunctionId f, Backend b, const Call& call) {
  return refuse(Reading(f, call), b);
}

Backend choose(FunctionId f, std::optional<Backend> wanted, const Call& call) {
  return choose(Reading(f, call), wanted);
}

Reading::Reading(FunctionId f, const Call& given) : id(f), call(given) {
  const Function& function = f.function();
  Sizes sizes;
  check_arguments(f.op->name, function.name, function.list, call, sizes);
  call.element = element_of(function.list, call);
  function.read(call, sizes, params);
  function.check(params, call);
}

const EntryPoint& prepare(Reading& r, std::optional<Backend> wanted, const Allocator& allocator) {
  const Backend backend = choose(r, wanted);
  check_data(r);
  if (backend != Backend::cpu) {
    describe_device(r.call);
    take_workspace(r, backend, allocator);
  }
  const EntryPoint& entry = entry_of(*find_instance(r, backend), r.id);
  check(entry.tag == r.id.function().tag, ErrorKind::runtime, r.id.name(),
        ": an instance takes other parameters than the list fills");
  return entry;
}

int64_t workspace(FunctionId f, Backend b, const Call& call) {
  Reading r(f, call);
  if (b != Backend::cpu) describe_device(r.call);
  return workspace_bytes(r, b);
}

std::string instance_name(FunctionId f, Backend b, const Call& call) {
  const Reading r(f, call);
  const std::string reason = refuse(r, b);
  check(reason.empty(), ErrorKind::not_implemented, f.name(), ": ", public_name(b),
        " has no instance for this call: ", reason);
  const Instance& i = *find_instance(r, b);
  std::string text = dtype_name(i.dtype);
  if (i.isa != Isa::none) text += concat(", ", isa_name(i.isa));
  if (i.dim != 0) text += concat(", dim ", i.dim);
  return text;
}

// ---- description ----

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

template <class List, class Format>
std::string json_list(const List& list, Format format) {
  std::string text = "[";
  for (const auto& item : list) text += (text.size() > 1 ? ", " : "") + format(item);
  return text + "]";
}

std::string json_instance(const Instance& i, const Operator* op) {
  std::vector<std::string> present;
  for (size_t f = 0; f < op->functions.size(); ++f)
    if (i.table->entries[f].run) present.emplace_back(op->functions[f].name);
  return concat("{\"backend\": ", quoted(backend_name(i.backend)),
                ", \"dtype\": ", quoted(dtype_name(i.dtype)), ", \"dim\": ", i.dim,
                ", \"isa\": ", quoted(isa_name(i.isa)),
                ", \"functions\": ", json_list(present, quoted), "}");
}

std::string json_operator(const Operator* op) {
  const auto name = [](const Function& f) { return quoted(f.name); };
  return concat(
      "{\"name\": ", quoted(op->name), ", \"functions\": ", json_list(op->functions, name),
      ", \"instances\": ",
      json_list(instances_of(op), [&](const Instance& i) { return json_instance(i, op); }), "}");
}

std::string json_cpu() {
  std::vector<Isa> available;
  for (Isa isa : built_isas())
    if (machine_has(isa)) available.push_back(isa);
  const auto name = [](Isa isa) { return quoted(isa_name(isa)); };
  return concat("{\"processor\": ", quoted(HW_PROCESSOR), ", \"isa\": ", name(cpu_isa()),
                ", \"available\": ", json_list(available, name),
                ", \"built\": ", json_list(built_isas(), name), "}");
}

std::string json_cuda() {
  return concat(
      "{\"built\": ", HW_CUDA_FOUND ? "true" : "false", ", \"reason\": ", quoted(HW_CUDA_REASON),
      ", \"toolkit\": ", quoted(HW_CUDA_VERSION),
      ", \"architectures\": {\"simt\": ", quoted(HW_CUDA_ARCHS_SIMT),
      ", \"sm80\": ", quoted(HW_CUDA_ARCHS_SM80), ", \"sm90\": ", quoted(HW_CUDA_ARCHS_SM90), "}}");
}

}  // namespace

std::string describe_library() {
  return concat(
      "{\"version\": ", quoted(HW_VERSION), ", \"preset\": ", quoted(HW_PRESET),
      ", \"build_type\": ", quoted(HW_BUILD_TYPE), ", \"compiler\": ", quoted(HW_COMPILER),
      ", \"emulator\": ", kEmulated ? "true" : "false", kEmulated ? "" : ", \"cpu\": " + json_cpu(),
      ", \"cuda\": ", json_cuda(), ", \"operators\": ", json_list(operators(), json_operator), "}");
}

}  // namespace hw
