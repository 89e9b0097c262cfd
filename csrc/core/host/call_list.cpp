// SPDX-License-Identifier: Apache-2.0
#include "core/host/call_list.h"

#include <limits>

namespace hw {
namespace {

bool is_floating(DType t) { return t <= DType::f16; }

DType wide_type(DType element) { return element == DType::f64 ? DType::f64 : DType::f32; }

class Check {
 public:
  Check(const char* op, const char* function, std::span<const Argument> list, const Call& call,
        Sizes& sizes)
      : op_(op), function_(function), list_(list), call_(call), sizes_(sizes) {}

  void run() {
    check_counts();
    element_ = element_of(list_, call_);
    size_t tensor = 0, scalar = 0;
    for (const Argument& a : list_) {
      if (a.is_tensor())
        check_tensor(a, call_.tensors[tensor++]);
      else
        check_scalar(a, call_.scalars[scalar++]);
    }
    check_broadcast();
  }

 private:
  template <class... Part>
  [[noreturn]] void fail(ErrorKind kind, const Part&... part) const {
    throw Error(kind, concat(op_, ".", function_, ": ", part...));
  }

  void check_counts() const {
    size_t tensors = 0;
    for (const Argument& a : list_) tensors += a.is_tensor();
    if (call_.tensors.size() != tensors)
      fail(ErrorKind::value, "got ", call_.tensors.size(), " tensors, expected ", tensors);
    if (call_.scalars.size() != list_.size() - tensors)
      fail(ErrorKind::value, "got ", call_.scalars.size(), " scalars, expected ",
           list_.size() - tensors);
  }

  void check_scalar(const Argument& a, const Scalar& x) const {
    if (a.kind == Kind::flag && x.integer != 0 && x.integer != 1)
      fail(ErrorKind::value, a.name, " is ", x.integer, ", expected 0 or 1");
    if (a.kind == Kind::choice && (x.integer < 0 || x.integer >= a.choices))
      fail(ErrorKind::value, "there is no ", a.name, " ", x.integer, ", only 0 to ", a.choices - 1);
  }

  DType expected(Kind kind) const {
    if (kind == Kind::index) return DType::i64;
    return kind == Kind::wide ? wide_type(element_) : element_;
  }

  void check_tensor(const Argument& a, const Tensor& t) {
    if (!t.present()) {
      if (a.is_optional) return;
      fail(ErrorKind::value, a.name, " is missing");
    }
    check_device(a, t);
    if (a.kind == Kind::element && !is_floating(t.dtype)) [[unlikely]]
      fail(ErrorKind::type, a.name, " is of ", dtype_name(t.dtype),
           ", expected float64, float32, bfloat16 or float16");
    if (t.dtype != expected(a.kind)) [[unlikely]]
      fail(ErrorKind::type, a.name, " is of ", dtype_name(t.dtype), ", expected ",
           dtype_name(expected(a.kind)));
    check_sizes(a, t);
    // Without memory it would be taken for one that is left out.
    if (a.kind == Kind::index && a.is_optional && t.numel() == 0)
      fail(ErrorKind::value, a.name, " has no elements; leave it out, or the call");
  }

  void check_device(const Argument& a, const Tensor& t) {
    if (!first_) first_ = &t, first_name_ = a.name;
    if (t.device != first_->device || t.device_index != first_->device_index) [[unlikely]]
      fail(ErrorKind::runtime, a.name, " is on another device than ", first_name_);
  }

  void check_sizes(const Argument& a, const Tensor& t) {
    int first = 0;
    if (a.has_rest && t.ndim == a.rank + 1) {
      if (t.size[0] != 2)
        fail(ErrorKind::value, a.name, " has size ", t.size[0],
             " at dimension 0, expected 2: a statistic and its rest");
      first = 1;
    }
    if (a.rank != t.ndim - first) [[unlikely]]
      fail(ErrorKind::value, a.name, " has ", t.ndim, " dimensions, expected ", a.rank, " [",
           a.sizes, "]");
    for (int d = 0; d < a.rank; ++d) check_size(a, d, t.size[first + d], first + d);
  }

  void check_size(const Argument& a, int d, int64_t size, int dimension) {
    if (size < 0) fail(ErrorKind::value, a.name, " has size ", size, " at dimension ", dimension);
    int64_t& known = sizes_.of[a.symbol[d]];
    if (a.may_be_one[d] && size == 1) {
      broadcast_ |= known < 0;
      return;
    }
    if (known < 0) known = size;
    if (size != known) [[unlikely]]
      fail(ErrorKind::value, a.name, " [", a.sizes, "] has size ", size, " at dimension ",
           dimension, ", expected ", known);
  }

  // Sizes of 1 that nobody has said otherwise.
  void check_broadcast() {
    if (!broadcast_) return;
    size_t tensor = 0;
    for (const Argument& a : list_) {
      if (!a.is_tensor() || !call_.tensors[tensor++].present()) continue;
      for (int d = 0; d < a.rank; ++d) {
        int64_t& known = sizes_.of[a.symbol[d]];
        if (known < 0) known = 1;
      }
    }
  }

  const char *op_, *function_;
  std::span<const Argument> list_;
  const Call& call_;
  Sizes& sizes_;
  DType element_ = DType::f32;
  const Tensor* first_ = nullptr;
  const char* first_name_ = nullptr;
  bool broadcast_ = false;
};

}  // namespace

void check_arguments(const char* op, const char* function, std::span<const Argument> list,
                     const Call& call, Sizes& sizes) {
  Check(op, function, list, call, sizes).run();
}

DType element_of(std::span<const Argument> list, const Call& call) {
  size_t tensor = 0;
  for (const Argument& a : list) {
    if (!a.is_tensor()) continue;
    if (tensor >= call.tensors.size()) break;
    const Tensor& t = call.tensors[tensor++];
    if (a.kind == Kind::element && t.present()) return t.dtype;
  }
  return DType::f32;
}

void check_bounds(const char* op, const char* name, const Ref<const int64_t, 1>& bounds,
                  const Call& call, int64_t batch, int64_t tokens) {
  check(batch == 1, ErrorKind::value, op, ": packed sequences are one batch entry, got ", batch);
  check(bounds.size[0] > 0, ErrorKind::value, op, ": ", name, " is empty, expected [N + 1]");
  if (!bounds.data || bounds.data == undescribed_data()) return;
  if (call.tensors[0].device != Device::cpu) return;
  int64_t before = 0;
  for (int64_t n = 0; n < bounds.size[0]; ++n) {
    check(bounds(n) >= before && bounds(n) <= tokens, ErrorKind::value, op, ": ", name, " is ",
          bounds(n), " at ", n, ", expected bounds that increase from 0 to at most ", tokens);
    before = bounds(n);
  }
}

void check_narrow(const char* op, const char* name, int64_t size) {
  check(size <= std::numeric_limits<int32_t>::max(), ErrorKind::value, op, ": ", name, " is ", size,
        ", expected less than 2^31");
}

}  // namespace hw
