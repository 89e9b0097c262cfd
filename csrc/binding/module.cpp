// SPDX-License-Identifier: Apache-2.0
// _C: the C table of the native libraries as Python functions. See python/headworks/_library.py,
// its only user, for what they mean.
#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/libraries.h"
#include "binding/tensor_reader.h"

namespace py = pybind11;

namespace hw {
namespace {

constexpr Py_ssize_t kMaxTensors = 32, kMaxScalars = 32;
constexpr size_t kMessageBytes = 8192;

// A call's arguments in C. Beyond those given, tensors are absent and scalars are zero.
class Arguments {
 public:
  Arguments(const py::handle& tensors, const py::handle& scalars, int threads)
      : tensors_kept_(sequence(tensors)), scalars_kept_(sequence(scalars)) {
    PyObject** const t = PySequence_Fast_ITEMS(tensors_kept_.ptr());
    PyObject** const s = PySequence_Fast_ITEMS(scalars_kept_.ptr());
    const Py_ssize_t nt = PySequence_Fast_GET_SIZE(tensors_kept_.ptr());
    const Py_ssize_t ns = PySequence_Fast_GET_SIZE(scalars_kept_.ptr());
    check(nt <= kMaxTensors && ns <= kMaxScalars, ErrorKind::value, "a call has at most ",
          kMaxTensors, " tensors and ", kMaxScalars, " scalars, got ", nt, " and ", ns);
    for (Py_ssize_t i = 0; i < nt; ++i) tensors_[i] = read_tensor(t[i], i);
    for (Py_ssize_t i = 0; i < ns; ++i) scalars_[i] = as_double(s[i]);
    arguments_ = {tensors_, scalars_, static_cast<int32_t>(nt), static_cast<int32_t>(ns), {}};
    arguments_.context.num_threads = threads;
    if (nt > 0 && tensors_[0].device == Device::cuda) {
      arguments_.context.device_index = tensors_[0].device_index;
      arguments_.context.stream = current_stream(t[0], tensors_[0].device_index);
    }
  }
  const HwArguments* get() const { return &arguments_; }

 private:
  static double as_double(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) throw PythonError();
    return value;
  }

  static py::object sequence(const py::handle& object) {
    PyObject* fast = PySequence_Fast(object.ptr(), "tensors and scalars come in a tuple or a list");
    if (!fast) throw PythonError();
    return py::reinterpret_steal<py::object>(fast);
  }

  py::object tensors_kept_, scalars_kept_;
  Tensor tensors_[kMaxTensors];
  double scalars_[kMaxScalars] = {};
  HwArguments arguments_;
};

// Room for the text that comes back from the library.
struct Buffer {
  char text[kMessageBytes];

  Buffer() { text[0] = '\0'; }
  HwMessage message() { return {text, sizeof text}; }
};

void require(int status, const Buffer& buffer) {
  if (status != 0) [[unlikely]]
    throw Error(static_cast<ErrorKind>(status), buffer.text);
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

std::string_view view(const py::str& text) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!data) throw PythonError();
  return {data, static_cast<size_t>(size)};
}

std::string full_name(const Target& t, int backend) {
  return (t.emulated ? "emulate:" : "") + std::string(backend_name(static_cast<Backend>(backend)));
}

// ---- the functions of the module ----

std::vector<std::string> functions() {
  std::vector<std::string> names;
  for (int i = 0; const char* name = native_api().function_name(i); ++i) names.emplace_back(name);
  return names;
}

void call(int function, const py::str& backend, const py::object& tensors,
          const py::object& scalars, int threads) {
  const Target t = target(view(backend));
  const Arguments arguments(tensors, scalars, threads);
  Buffer buffer;
  int status;
  {
    const WithoutGil released;
    status = t.api->call(function, t.backend, arguments.get(), buffer.message());
  }
  require(status, buffer);
}

std::string choose(int function, const py::str& backend, const py::object& tensors,
                   const py::object& scalars) {
  const Target t = target(view(backend));
  const Arguments arguments(tensors, scalars, 1);
  Buffer buffer;
  int chosen = 0;
  require(t.api->choose(function, t.backend, arguments.get(), &chosen, buffer.message()), buffer);
  return full_name(t, chosen);
}

std::string why_not(int function, const py::str& backend, const py::object& tensors,
                    const py::object& scalars) {
  Target t{};
  try {
    t = target(view(backend));
  } catch (const EmulatorMissing& e) {
    return e.what();
  }
  const Arguments arguments(tensors, scalars, 1);
  Buffer buffer;
  require(t.api->why_not(function, t.backend, arguments.get(), buffer.message()), buffer);
  return buffer.text;
}

std::string instance(int function, const py::str& backend, const py::object& tensors,
                     const py::object& scalars) {
  const Target t = target(view(backend));
  const Arguments arguments(tensors, scalars, 1);
  Buffer buffer;
  require(t.api->instance(function, t.backend, arguments.get(), buffer.message()), buffer);
  return buffer.text;
}

int64_t workspace(int function, const py::str& backend, const py::object& tensors,
                  const py::object& scalars, int threads) {
  const Target t = target(view(backend));
  const Arguments arguments(tensors, scalars, threads);
  Buffer buffer;
  int64_t bytes = 0;
  require(t.api->workspace(function, t.backend, arguments.get(), &bytes, buffer.message()), buffer);
  return bytes;
}

std::string info(bool emulator) {
  const HwApi& api = emulator ? emulator_api() : native_api();
  std::string text(api.info(nullptr, 0) + 1, '\0');
  text.resize(api.info(text.data(), text.size()));
  return text;
}

void configure(bool emulator, const std::string& key, const std::string& value) {
  const HwApi& api = emulator ? emulator_api() : native_api();
  Buffer buffer;
  require(api.configure(key.c_str(), value.c_str(), buffer.message()), buffer);
}

// The least and the largest element of an int64 tensor of the CPU. Of a few elements torch.aminmax
// would cost more than a whole call.
std::pair<int64_t, int64_t> extremes(const py::object& object) {
  const Tensor t = read_tensor(object.ptr(), 0);
  check(t.data && t.dtype == DType::i64 && t.device == Device::cpu && t.numel() > 0,
        ErrorKind::type, "extremes are those of an int64 tensor of the CPU with elements");
  const int64_t* const data = static_cast<const int64_t*>(t.data);
  int64_t least = std::numeric_limits<int64_t>::max(), most = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < t.numel(); ++i) {
    int64_t rest = i, at = 0;
    for (int d = t.ndim - 1; d >= 0; rest /= t.size[d--]) at += rest % t.size[d] * t.stride[d];
    least = std::min(least, data[at]);
    most = std::max(most, data[at]);
  }
  return {least, most};
}

// What read_tensor sees: (data, sizes, strides, dtype, device, index), for the tests.
py::tuple describe(const py::object& object) {
  const Tensor t = read_tensor(object.ptr(), 0);
  py::list sizes, strides;
  for (int d = 0; d < t.ndim; ++d) {
    sizes.append(t.size[d]);
    strides.append(t.stride[d]);
  }
  return py::make_tuple(reinterpret_cast<uintptr_t>(t.data), py::tuple(sizes), py::tuple(strides),
                        dtype_name(t.dtype), static_cast<int>(t.device), t.device_index);
}

PyObject* exception_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::value: return PyExc_ValueError;
    case ErrorKind::type: return PyExc_TypeError;
    case ErrorKind::not_implemented: return PyExc_NotImplementedError;
    default: return PyExc_RuntimeError;
  }
}

void translate(std::exception_ptr failure) {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const Error& e) {
    PyErr_SetString(exception_of(e.kind()), e.what());
  } catch (const PythonError&) {
    // The exception is set.
  }
}

}  // namespace
}  // namespace hw

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  try {
    hw::prepare_reader();
  } catch (const hw::PythonError&) {
    throw py::error_already_set();
  }
  py::register_local_exception_translator(&hw::translate);
  m.def("functions", &hw::functions);
  m.def("call", &hw::call);
  m.def("choose", &hw::choose);
  m.def("why_not", &hw::why_not);
  m.def("instance", &hw::instance);
  m.def("workspace", &hw::workspace);
  m.def("info", &hw::info);
  m.def("configure", &hw::configure);
  m.def("extremes", &hw::extremes);
  m.def("describe", &hw::describe);
  m.def("use_exchange_api", &hw::use_exchange_api);
}
