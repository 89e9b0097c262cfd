// SPDX-License-Identifier: Apache-2.0
#include "binding/repeat_key.h"

#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "binding/tensor_reader.h"

namespace hw {
namespace {

class Key {
 public:
  // False: no key can be made.
  bool add_tensor(PyObject* object, Py_ssize_t position) {
    if (!is_plain_tensor(object)) return false;
    Tensor t;
    try {
      t = read_tensor(object, position);
    } catch (const PythonError&) {
      PyErr_Clear();  // sparse, nested, of another dtype: the checks will say so
      return false;
    }
    add(static_cast<int8_t>(t.ndim));
    add(static_cast<int8_t>(t.dtype));
    add(static_cast<int8_t>(t.device));
    add(static_cast<int16_t>(t.device_index));
    for (int d = 0; d < t.ndim; ++d) add(t.size[d]), add(t.stride[d]);
    return !full_;
  }

  bool add_option(PyObject* x) {
    if (x == Py_None) {
      add('N');
    } else if (PyBool_Check(x)) {
      add(x == Py_True ? 'T' : 'F');
    } else if (PyLong_CheckExact(x)) {
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
      if (overflow != 0) return false;
      add('i'), add(value);
    } else if (PyFloat_CheckExact(x)) {
      add('f'), add(PyFloat_AS_DOUBLE(x));
    } else if (PyUnicode_CheckExact(x)) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(x, &size);
      if (!text) return PyErr_Clear(), false;
      add('s'), add(size), add_bytes(text, static_cast<size_t>(size));
    } else if (PyTuple_CheckExact(x)) {
      add('('), add(PyTuple_GET_SIZE(x));
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i)
        if (!add_option(PyTuple_GET_ITEM(x, i))) return false;
    } else {
      return false;
    }
    return !full_;
  }

  std::string_view bytes() const { return {bytes_, size_}; }

 private:
  template <class T>
  void add(T value) {
    static_assert(std::is_arithmetic_v<T>);
    add_bytes(&value, sizeof value);
  }
  void add_bytes(const void* from, size_t count) {
    full_ |= size_ + count > sizeof bytes_;
    if (full_) return;
    std::memcpy(bytes_ + size_, from, count);
    size_ += count;
  }

  char bytes_[2048];
  size_t size_ = 0;
  bool full_ = false;
};

bool add_all(Key& key, PyObject* tensors, PyObject* options) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i)
    if (!key.add_tensor(PyTuple_GET_ITEM(tensors, i), i)) return false;
  return key.add_option(options);
}

}  // namespace

PyObject* repeat_key(PyObject* tensors, PyObject* options) {
  if (!PyTuple_CheckExact(tensors) || !PyTuple_CheckExact(options)) {
    PyErr_SetString(PyExc_TypeError, "a key is made of a tuple of tensors and one of options");
    throw PythonError();
  }
  Key key;
  if (!add_all(key, tensors, options)) Py_RETURN_NONE;
  PyObject* const made =
      PyBytes_FromStringAndSize(key.bytes().data(), static_cast<Py_ssize_t>(key.bytes().size()));
  if (!made) throw PythonError();
  return made;
}

}  // namespace hw
