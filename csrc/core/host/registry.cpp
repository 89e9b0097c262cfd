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

// Of the first tensor of numbers that are not integers: lists of indices may come before it.
DType element_type(const Call& call) {
  for (const Tensor& t : call.tensors)
    if (t.present() && t.dtype <= DType::f16) return t.dtype;
  return call.tensor(0).dtype;
}

// On the CPU the strongest instruction set up to the one in use; on a GPU the smallest dim that
// holds the call's.
const Instance* find_instance(FunctionId f, Backend b, const Call& call) {
  const DType dtype = element_type(call);
  const Isa isa = b == Backend::cpu ? cpu_isa() : Isa::none;
  const int dim = b == Backend::cpu ? 0 : f.op->dim(f.index, b, call);
  const Instance* best = nullptr;
  for (const Instance& i : instances_of(f.op)) {
    if (!serves(i, b, dtype) || i.isa > isa) continue;
    if (i.dim != 0 && i.dim < dim) continue;
    const bool better = !best || i.isa > best->isa || (i.dim != 0 && i.dim < best->dim);
    if (better) best = &i;
  }
  return best;
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

std::string refuse_device(Backend b, const Call& call) {
  const Device device = call.tensor(0).device;
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
std::string explain_absence(FunctionId f, Backend b, const Call& call) {
  const std::string dtypes = built_dtypes(f, b);
  const DType dtype = element_type(call);
  if (dtypes.empty()) return concat("this build has no ", public_name(b), " code for ", f.op->name);
  const std::string dims = built_dims(f, b, dtype);
  if (dims.empty()) return concat("no ", dtype_name(dtype), " (this build has ", dtypes, ")");
  return concat("no dim ", f.op->dim(f.index, b, call), " (this build has ", dims, ")");
}

std::string refuse_build(FunctionId f, Backend b, const Call& call) {
  const Instance* instance = find_instance(f, b, call);
  if (!instance) return explain_absence(f, b, call);
  if (!instance->table->run[f.index])
    return concat("there is no ", public_name(b), " kernel for ", f.name());
  return {};
}

std::string refuse_capability(Backend b, const Call& call) {
  if (b == Backend::cpu) return {};
  const int capability = cuda_device(call.tensor(0).device_index).capability;
  if (kEmulated) {
    const int least = least_capability(b);
    if (capability >= least) return {};
    return concat("the emulated device is sm_", capability, ", and the code is for sm_", least);
  }
  if (archs_cover(built_archs(b), capability)) return {};
  return concat("the device is sm_", capability, ", and the code was built for ", built_archs(b));
}

std::string refuse(FunctionId f, Backend b, const Call& call) {
  std::string reason = refuse_device(b, call);
  if (reason.empty()) reason = refuse_build(f, b, call);
  if (reason.empty()) reason = refuse_capability(b, call);
  if (reason.empty()) reason = f.op->why_not(f.index, b, call);
  return reason;
}

// ---- checks of every call ----

// The call's tensors in one place; the operators' own checks name the arguments.
void check_devices(FunctionId f, const Call& call) {
  const Tensor& first = call.tensor(0);
  for (size_t i = 1; i < call.tensors.size(); ++i) {
    const Tensor& t = call.tensors[i];
    if (!t.present() || (t.device == first.device && t.device_index == first.device_index))
      continue;
    throw Error(ErrorKind::runtime, concat(f.name(), ": tensor ", i,
                                           " of the call is on another device than tensor 0"));
  }
}

void check_call(FunctionId f, const Call& call) {
  if (call.tensors.empty() || !call.tensor(0).present()) [[unlikely]]
    throw Error(ErrorKind::value, f.name() + ": a call needs at least its first tensor");
  check_devices(f, call);
  check_signature(f.op->name, f.op->functions[static_cast<size_t>(f.index)],
                  f.op->signatures[static_cast<size_t>(f.index)], call);
  f.op->check(f.index, call);
}

void check_data(FunctionId f, const Call& call) {
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const Tensor& t = call.tensors[i];
    if (!t.present() || t.data != nullptr || t.numel() == 0) continue;
    throw Error(ErrorKind::runtime,
                concat(f.name(), ": tensor ", i, " of the call has no data. It is a fake or meta ",
                       "tensor; run the function on real tensors, or under torch.compile, which ",
                       "uses shapes alone"));
  }
}

std::string list_reasons(FunctionId f, std::span<const Backend> candidates, const Call& call) {
  std::string text = f.name() + ": no backend can take this call";
  for (Backend b : candidates) text += concat("\n  ", public_name(b), ": ", refuse(f, b, call));
  return text;
}

}  // namespace

std::string FunctionId::name() const { return concat(op->name, ".", op->functions[index]); }

int num_functions() { return static_cast<int>(functions().size()); }

FunctionId function_by_number(int number) {
  check(number >= 0 && number < num_functions(), ErrorKind::value, "there is no function number ",
        number);
  return functions()[static_cast<size_t>(number)];
}

std::string why_not(FunctionId f, Backend b, const Call& call) {
  check_call(f, call);
  return refuse(f, b, call);
}

Backend choose(FunctionId f, std::optional<Backend> wanted, const Call& call) {
  check_call(f, call);
  if (wanted) {
    const std::string reason = refuse(f, *wanted, call);
    if (reason.empty()) [[likely]]
      return *wanted;
    throw Error(ErrorKind::not_implemented, concat(f.name(), ": backend '", public_name(*wanted),
                                                   "' cannot take this call: ", reason));
  }
  const bool gpu = kEmulated || call.tensor(0).device == Device::cuda;
  const std::span<const Backend> candidates =
      gpu ? std::span<const Backend>(kGpuBackends) : std::span<const Backend>(kCpuBackends);
  for (Backend b : candidates)
    if (refuse(f, b, call).empty()) return b;
  throw Error(ErrorKind::not_implemented, list_reasons(f, candidates, call));
}

void run(FunctionId f, std::optional<Backend> wanted, Call call) {
  const Backend backend = choose(f, wanted, call);
  check_data(f, call);
  if (backend != Backend::cpu) {
    call.context.device_index = call.tensor(0).device_index;
    call.context.multiprocessors = cuda_device(call.context.device_index).multiprocessors;
  }
  find_instance(f, backend, call)->table->run[f.index](call);
}

int64_t workspace(FunctionId f, Backend b, const Call& call) {
  check_call(f, call);
  if (b == Backend::cpu) return 0;
  Call described = call;
  described.context.multiprocessors = cuda_device(call.tensor(0).device_index).multiprocessors;
  return f.op->workspace(f.index, b, described);
}

std::string instance_name(FunctionId f, Backend b, const Call& call) {
  const std::string reason = why_not(f, b, call);
  check(reason.empty(), ErrorKind::not_implemented, f.name(), ": ", public_name(b),
        " has no instance for this call: ", reason);
  const Instance& i = *find_instance(f, b, call);
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
    if (i.table->run[f]) present.emplace_back(op->functions[f]);
  return concat("{\"backend\": ", quoted(backend_name(i.backend)),
                ", \"dtype\": ", quoted(dtype_name(i.dtype)), ", \"dim\": ", i.dim,
                ", \"isa\": ", quoted(isa_name(i.isa)),
                ", \"functions\": ", json_list(present, quoted), "}");
}

std::string json_operator(const Operator* op) {
  const std::vector<std::string> names(op->functions.begin(), op->functions.end());
  return concat(
      "{\"name\": ", quoted(op->name), ", \"functions\": ", json_list(names, quoted),
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
