// SPDX-License-Identifier: Apache-2.0
// torch tensors as hw::Tensor, without torch's headers.
//
//   by the DLPack C exchange API   where the tensor's type offers it (torch 2.10 and later)
//   by attributes                  data_ptr(), shape, stride(), dtype, device otherwise
//
// Both give the same. What is read is borrowed: the caller keeps the tensors alive. All functions
// need the GIL and throw PythonError with a Python exception set.
#pragma once

#include <Python.h>

#include "core/host/call.h"

namespace hw {

struct PythonError {};

// Looks up in torch what the other functions need; once, when the module is imported. Not at the
// first tensor: an import that lets other threads run must not happen inside a call.
void prepare_reader();

// None gives an absent tensor. `position` is for messages.
Tensor read_tensor(PyObject* object, Py_ssize_t position);

// Whether it is a torch.Tensor and not one of a subclass, a Parameter among them.
bool is_plain_tensor(PyObject* object);

// The current CUDA stream of torch on that device.
void* current_stream(PyObject* tensor, int device_index);

// As many threads as torch would use on the CPU.
int num_threads();

// For tests: read by attributes even where the exchange API is there.
void use_exchange_api(bool use);

}  // namespace hw
