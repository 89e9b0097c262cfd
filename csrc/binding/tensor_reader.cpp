// SPDX-License-Identifier: Apache-2.0
#include "binding/tensor_reader.h"

#include <atomic>
#include <iterator>

#include "binding/dlpack.h"

namespace hw {
namespace {

std::atomic<bool> exchange_allowed{true};

// A new reference that ends with its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object_) throw PythonError();
  }
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

constexpr DType kDTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16,
                             DType::i64, DType::i32, DType::u8};

PyObject* intern(const char* text) { return Owned(PyUnicode_InternFromString(text)).release(); }

// Names and torch's dtype objects, looked up once and kept for the life of the process.
struct Names {
  PyObject* data_ptr = intern("data_ptr");
  PyObject* shape = intern("shape");
  PyObject* stride = intern("stride");
  PyObject* dtype = intern("dtype");
  PyObject* is_cpu = intern("is_cpu");
  PyObject* is_cuda = intern("is_cuda");
  PyObject* get_device = intern("get_device");
  PyObject* exchange = intern("__dlpack_c_exchange_api__");
};
const Names& names() {
  static const Names all;
  return all;
}

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const dlpack::ExchangeApi* exchange;  // of the two above; may be null
  PyObject* dtypes[std::size(kDTypes)];
  PyObject* threads;     // torch.get_num_threads
  PyObject* raw_stream;  // torch._C._cuda_getCurrentRawStream; null in builds for the CPU

  Torch();
};
const Torch* the_torch = nullptr;
const Torch& torch() { return *the_torch; }

// The exchange table that a type offers, or null.
const dlpack::ExchangeApi* exchange_of(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), names().exchange);
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const Owned owned(capsule);
  const void* table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!table) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
  const bool usable = api->header.version.major == dlpack::kMajorVersion &&
                      api->tensor_from_object && api->current_stream;
  return usable ? api : nullptr;
}

Torch::Torch() {
  const Owned module(PyImport_ImportModule("torch"));
  tensor = reinterpret_cast<PyTypeObject*>(
      Owned(PyObject_GetAttrString(module.get(), "Tensor")).release());
  const Owned nn(PyObject_GetAttrString(module.get(), "nn"));
  parameter = reinterpret_cast<PyTypeObject*>(
      Owned(PyObject_GetAttrString(nn.get(), "Parameter")).release());
  exchange = exchange_of(tensor);
  for (size_t i = 0; i < std::size(kDTypes); ++i)
    dtypes[i] = Owned(PyObject_GetAttrString(module.get(), dtype_name(kDTypes[i]))).release();
  threads = Owned(PyObject_GetAttrString(module.get(), "get_num_threads")).release();
  const Owned internals(PyObject_GetAttrString(module.get(), "_C"));
  raw_stream = PyObject_GetAttrString(internals.get(), "_cuda_getCurrentRawStream");
  if (!raw_stream) PyErr_Clear();
}

[[noreturn]] void refuse_dtype(Py_ssize_t position, PyObject* object) {
  const Owned dtype(PyObject_GetAttr(object, names().dtype));
  PyErr_Format(PyExc_TypeError,
               "tensor %zd of the call is of %S; the native library takes float64, float32, "
               "bfloat16, float16, int64, int32 and uint8",
               position, dtype.get());
  throw PythonError();
}

void check_rank(Py_ssize_t position, Py_ssize_t ndim) {
  if (ndim <= kMaxDims) return;
  PyErr_Format(PyExc_ValueError, "tensor %zd of the call has %zd dimensions; at most %d are taken",
               position, ndim, kMaxDims);
  throw PythonError();
}

// ---- by the exchange API ----

bool convert(dlpack::DataType t, DType* out) {
  if (t.lanes != 1) return false;
  const auto is = [&](uint8_t code, int bits) { return t.code == code && t.bits == bits; };
  if (is(dlpack::kFloat, 32))
    *out = DType::f32;
  else if (is(dlpack::kBfloat, 16))
    *out = DType::bf16;
  else if (is(dlpack::kFloat, 16))
    *out = DType::f16;
  else if (is(dlpack::kFloat, 64))
    *out = DType::f64;
  else if (is(dlpack::kInt, 64))
    *out = DType::i64;
  else if (is(dlpack::kInt, 32))
    *out = DType::i32;
  else if (is(dlpack::kUInt, 8))
    *out = DType::u8;
  else
    return false;
  return true;
}

Device convert(dlpack::Device d) {
  switch (d.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost: return Device::cpu;
    case dlpack::kCuda:
    case dlpack::kCudaManaged: return Device::cuda;
    default: return Device::other;
  }
}

// False if the producer refuses, as it does for tensors without memory.
bool read_by_exchange(const dlpack::ExchangeApi* api, PyObject* object, Py_ssize_t position,
                      Tensor* out) {
  dlpack::Tensor t;
  if (api->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  check_rank(position, t.ndim);
  if (!convert(t.dtype, &out->dtype)) refuse_dtype(position, object);
  out->data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  out->ndim = t.ndim;
  out->device = convert(t.device);
  out->device_index = out->device == Device::cpu ? 0 : t.device.index;
  for (int32_t d = 0; d < t.ndim; ++d) {
    out->size[d] = t.shape[d];
    out->stride[d] = t.strides[d];
  }
  return true;
}

// ---- by attributes ----

int64_t as_integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool is_true(PyObject* object, PyObject* name) {
  return Owned(PyObject_GetAttr(object, name)).get() == Py_True;
}

Py_ssize_t read_integers(PyObject* sequence, Py_ssize_t position, int64_t* out) {
  const Owned fast(PySequence_Fast(sequence, "a shape or stride is not a sequence"));
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(fast.get());
  check_rank(position, n);
  for (Py_ssize_t i = 0; i < n; ++i) out[i] = as_integer(PySequence_Fast_GET_ITEM(fast.get(), i));
  return n;
}

void read_dtype(PyObject* object, Py_ssize_t position, Tensor* out) {
  const Owned dtype(PyObject_GetAttr(object, names().dtype));
  for (size_t i = 0; i < std::size(kDTypes); ++i)
    if (dtype.get() == torch().dtypes[i]) {
      out->dtype = kDTypes[i];
      return;
    }
  refuse_dtype(position, object);
}

void read_device(PyObject* object, Tensor* out) {
  if (is_true(object, names().is_cpu)) {
    out->device = Device::cpu;
    return;
  }
  out->device = is_true(object, names().is_cuda) ? Device::cuda : Device::other;
  const Owned index(PyObject_CallMethodNoArgs(object, names().get_device));
  out->device_index = static_cast<int32_t>(as_integer(index.get()));
}

void read_by_attributes(PyObject* object, Py_ssize_t position, Tensor* out) {
  read_dtype(object, position, out);
  read_device(object, out);
  const Owned shape(PyObject_GetAttr(object, names().shape));
  const Owned stride(PyObject_CallMethodNoArgs(object, names().stride));
  out->ndim = static_cast<int32_t>(read_integers(shape.get(), position, out->size));
  read_integers(stride.get(), position, out->stride);
  if (out->device == Device::other) return;  // no memory that could be used
  const Owned pointer(PyObject_CallMethodNoArgs(object, names().data_ptr));
  out->data = PyLong_AsVoidPtr(pointer.get());
  if (!out->data && PyErr_Occurred()) throw PythonError();
}

const dlpack::ExchangeApi* exchange_for(PyObject* object) {
  if (!exchange_allowed.load(std::memory_order_relaxed)) return nullptr;
  PyTypeObject* type = Py_TYPE(object);
  const Torch& t = torch();
  if (type == t.tensor || type == t.parameter) return t.exchange;
  return exchange_of(type);
}

}  // namespace

void prepare_reader() {
  names();
  if (!the_torch) the_torch = new Torch;
}

Tensor read_tensor(PyObject* object, Py_ssize_t position) {
  Tensor result;
  if (object == Py_None) return result;
  const dlpack::ExchangeApi* api = exchange_for(object);
  if (api && read_by_exchange(api, object, position, &result)) return result;
  if (!PyObject_TypeCheck(object, torch().tensor)) {
    PyErr_Format(PyExc_TypeError, "tensor %zd of the call is a %s; expected a torch.Tensor or None",
                 position, Py_TYPE(object)->tp_name);
    throw PythonError();
  }
  read_by_attributes(object, position, &result);
  return result;
}

bool is_plain_tensor(PyObject* object) { return Py_TYPE(object) == torch().tensor; }

void* current_stream(PyObject* tensor, int device_index) {
  void* stream = nullptr;
  if (const dlpack::ExchangeApi* api = exchange_for(tensor)) {
    if (api->current_stream(dlpack::kCuda, device_index, &stream) != 0) throw PythonError();
    return stream;
  }
  if (!torch().raw_stream) {
    PyErr_SetString(PyExc_RuntimeError,
                    "this torch has no CUDA streams; install a CUDA build of it");
    throw PythonError();
  }
  const Owned index(PyLong_FromLong(device_index));
  const Owned result(PyObject_CallOneArg(torch().raw_stream, index.get()));
  stream = PyLong_AsVoidPtr(result.get());
  if (!stream && PyErr_Occurred()) throw PythonError();
  return stream;
}

int num_threads() {
  const Owned count(PyObject_CallNoArgs(torch().threads));
  return static_cast<int>(as_integer(count.get()));
}

void use_exchange_api(bool use) { exchange_allowed.store(use, std::memory_order_relaxed); }

}  // namespace hw
