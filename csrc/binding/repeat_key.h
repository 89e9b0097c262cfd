// SPDX-License-Identifier: Apache-2.0
// What a call depends on but the elements of its tensors, as bytes: two calls with the same key
// need the same checks, and differ in pointers alone.
#pragma once

#include <Python.h>

namespace hw {

// Of a tuple of tensors (type, dtype, device, sizes, strides) and a tuple of options: numbers,
// flags, names, None, and tuples of these, which keep their types apart (1, 1.0 and True differ).
// A new reference to bytes; to None where a tensor is of a subclass or cannot be read, or an option
// is something else. Throws PythonError.
PyObject* repeat_key(PyObject* tensors, PyObject* options);

}  // namespace hw
