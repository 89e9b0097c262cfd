// SPDX-License-Identifier: Apache-2.0
// _C: the C table of the native libraries as Python functions. See python/headworks/_library.py,
// its only user, for what they mean.
#include <algorithm>
#include <exception>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/libraries.h"
#include "binding/repeat_key.h"
#include "binding/tensor_reader.h"

namespace py = pybind11;

namespace hw {
namespace {

constexpr size_t kMaxTensors = 48, kMaxScalars = 48;
constexpr size_t kMessageBytes = 8192;

// ---- functions and their lists ----

struct NativeFunction {
  std::string name;
  std::span<const Argument> arguments;
  std::vector<const Argument*> scalars;
  size_t tensors = 0;
};

// Of the library and of the emulator alike: both have the same lists.
const std::vector<NativeFunction>& native_functions() {
  static const std::vector<NativeFunction> all = [] {
    std::vector<NativeFunction> list;
    HwFunction f;
    for (int i = 0; native_api().function(i, &f); ++i) {
      NativeFunction n{f.name, {f.arguments, static_cast<size_t>(f.num_arguments)}, {}, 0};
      for (const Argument& a : n.arguments) {
        if (a.is_tensor())
          ++n.tensors;
        else
          n.scalars.push_back(&a);
      }
      list.push_back(std::move(n));
    }
    return list;
  }();
  return all;
}

const NativeFunction& native_function(int number) {
  const std::vector<NativeFunction>& all = native_functions();
  check(number >= 0 && static_cast<size_t>(number) < all.size(), ErrorKind::value,
        "there is no function number ", number);
  return all[static_cast<size_t>(number)];
}

// ---- arguments ----

Scalar read_scalar(const NativeFunction& f, const Argument& a, PyObject* object) {
  Scalar x;
  if (a.kind == Kind::number) {
    x.number = PyFloat_AsDouble(object);
    if (x.number == -1.0 && PyErr_Occurred()) throw PythonError();
    return x;
  }
  check(PyIndex_Check(object) != 0, ErrorKind::type, f.name, ": ", a.name, " is a ",
        Py_TYPE(object)->tp_name, ", expected an integer");
  int overflow = 0;
  const py::object integer = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!integer) throw PythonError();
  x.integer = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  check(overflow == 0, ErrorKind::value, f.name, ": ", a.name, " does not fit 64 bits");
  return x;
}

// What allocates workspaces: a Python function of a number of bytes and a tensor that lies where
// they are wanted; it returns a tensor.
py::object& allocator() {
  static py::gil_safe_call_once_and_store<py::object> storage;
  return storage.call_once_and_store_result([] { return py::object(); }).get_stored();
}

// A call's arguments in C.
class Arguments {
 public:
  Arguments(int function, const py::handle& tensors, const py::handle& scalars, int threads)
      : tensors_kept_(sequence(tensors)), scalars_kept_(sequence(scalars)) {
    const NativeFunction& f = native_function(function);
    const std::span<PyObject*> t = items(tensors_kept_), s = items(scalars_kept_);
    check(t.size() == f.tensors, ErrorKind::value, f.name, ": got ", t.size(),
          " tensors, expected ", f.tensors);
    check(s.size() == f.scalars.size(), ErrorKind::value, f.name, ": got ", s.size(),
          " scalars, expected ", f.scalars.size());
    check(t.size() <= kMaxTensors && s.size() <= kMaxScalars, ErrorKind::value,
          "a call has at most ", kMaxTensors, " tensors and ", kMaxScalars, " scalars");
    for (size_t i = 0; i < t.size(); ++i) tensors_[i] = read_tensor(t[i], i);
    for (size_t i = 0; i < s.size(); ++i) scalars_[i] = read_scalar(f, *f.scalars[i], s[i]);
    arguments_ = {
        tensors_,  scalars_, static_cast<int32_t>(t.size()), static_cast<int32_t>(s.size()), {},
        &allocate, this};
    arguments_.context.num_threads = threads;
    if (t.empty()) return;
    first_ = t[0];
    if (tensors_[0].device != Device::cuda) return;
    arguments_.context.device_index = tensors_[0].device_index;
    arguments_.context.stream = current_stream(first_, tensors_[0].device_index);
  }
  const HwArguments* get() const { return &arguments_; }

  // What went wrong in Python while native code ran.
  void rethrow() {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  static void* allocate(void* self, int64_t bytes) {
    return static_cast<Arguments*>(self)->allocate(bytes);
  }
  void* allocate(int64_t bytes) {
    const py::gil_scoped_acquire acquired;
    try {
      workspace_ = allocator()(bytes, py::handle(first_));
      return read_tensor(workspace_.ptr(), 0).data;
    } catch (...) {
      failure_ = std::current_exception();
      return nullptr;
    }
  }

  static py::object sequence(const py::handle& object) {
    PyObject* fast = PySequence_Fast(object.ptr(), "tensors and scalars come in a tuple or a list");
    if (!fast) throw PythonError();
    return py::reinterpret_steal<py::object>(fast);
  }
  static std::span<PyObject*> items(const py::object& fast) {
    return {PySequence_Fast_ITEMS(fast.ptr()),
            static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr()))};
  }

  py::object tensors_kept_, scalars_kept_, workspace_;
  PyObject* first_ = nullptr;
  std::exception_ptr failure_;
  Tensor tensors_[kMaxTensors];
  Scalar scalars_[kMaxScalars];
  HwArguments arguments_;
};

// Space for the text that comes back from the library.
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

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::element: return "element";
    case Kind::wide: return "wide";
    case Kind::index: return "index";
    case Kind::number: return "number";
    case Kind::flag: return "flag";
    case Kind::integer: return "integer";
    case Kind::choice: return "choice";
  }
  return "unknown";
}

// (name, kind, sizes or None, way, optional, has a rest) of each argument, by name of the function.
py::dict functions() {
  static constexpr const char* kWays[] = {"in", "out", "inout"};
  py::dict all;
  for (const NativeFunction& f : native_functions()) {
    py::list arguments;
    for (const Argument& a : f.arguments) {
      const py::object sizes = a.is_tensor() ? py::object(py::str(a.sizes)) : py::none();
      arguments.append(py::make_tuple(a.name, kind_name(a.kind), sizes,
                                      kWays[static_cast<int>(a.way)], a.is_optional != 0,
                                      a.has_rest != 0));
    }
    all[py::str(f.name)] = py::tuple(arguments);
  }
  return all;
}

void set_allocator(const py::object& function) { allocator() = function; }

void call(int function, const py::str& backend, const py::object& tensors,
          const py::object& scalars) {
  const Target t = target(view(backend));
  Arguments arguments(function, tensors, scalars, num_threads());
  Buffer buffer;
  int status;
  {
    const WithoutGil released;
    status = t.api->call(function, t.backend, arguments.get(), buffer.message());
  }
  arguments.rethrow();
  require(status, buffer);
}

std::string choose(int function, const py::str& backend, const py::object& tensors,
                   const py::object& scalars) {
  const Target t = target(view(backend));
  const Arguments arguments(function, tensors, scalars, 1);
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
  const Arguments arguments(function, tensors, scalars, 1);
  Buffer buffer;
  require(t.api->why_not(function, t.backend, arguments.get(), buffer.message()), buffer);
  return buffer.text;
}

std::string instance(int function, const py::str& backend, const py::object& tensors,
                     const py::object& scalars) {
  const Target t = target(view(backend));
  const Arguments arguments(function, tensors, scalars, 1);
  Buffer buffer;
  require(t.api->instance(function, t.backend, arguments.get(), buffer.message()), buffer);
  return buffer.text;
}

int64_t workspace(int function, const py::str& backend, const py::object& tensors,
                  const py::object& scalars) {
  const Target t = target(view(backend));
  const Arguments arguments(function, tensors, scalars, num_threads());
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

py::object repeat_key_of(const py::tuple& tensors, const py::tuple& options) {
  return py::reinterpret_steal<py::object>(repeat_key(tensors.ptr(), options.ptr()));
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
  m.def("set_allocator", &hw::set_allocator);
  m.def("call", &hw::call, py::arg("fn"), py::arg("backend"), py::arg("tensors"),
        py::arg("scalars") = py::tuple());
  m.def("choose", &hw::choose);
  m.def("why_not", &hw::why_not);
  m.def("instance", &hw::instance);
  m.def("workspace", &hw::workspace);
  m.def("info", &hw::info);
  m.def("configure", &hw::configure);
  m.def("extremes", &hw::extremes);
  m.def("repeat_key", &hw::repeat_key_of);
  m.def("describe", &hw::describe);
  m.def("use_exchange_api", &hw::use_exchange_api);
}
