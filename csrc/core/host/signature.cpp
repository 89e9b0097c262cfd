// SPDX-License-Identifier: Apache-2.0
#include "core/host/signature.h"

#include <limits>

namespace hw {
namespace {

// Sizes of the letters of a call, -1 before a letter is met.
class Sizes {
 public:
  Sizes() {
    for (int64_t& x : size_) x = -1;
  }
  int64_t& of(char letter) { return size_[letter & 127]; }

 private:
  int64_t size_[128];
};

bool is_floating(DType t) { return t <= DType::f16; }

DType wide_type(DType element) { return element == DType::f64 ? DType::f64 : DType::f32; }

class Check {
 public:
  Check(const char* op, const char* function, const Signature& s, const Call& call)
      : op_(op), function_(function), s_(s), call_(call) {}

  void run() {
    check_counts();
    find_element();
    for (size_t i = 0; i < s_.tensors.size(); ++i) check_tensor(s_.tensors[i], call_.tensors[i]);
  }

 private:
  template <class... Part>
  [[noreturn]] void fail(ErrorKind kind, const Part&... part) const {
    throw Error(kind, concat(op_, ".", function_, ": ", part...));
  }

  void check_counts() const {
    const size_t count = call_.tensors.size(), wanted = s_.tensors.size();
    if (count != wanted && count != wanted + 1)
      fail(ErrorKind::value, "got ", count, " tensors, expected ", wanted, ", or ", wanted + 1,
           " with a workspace");
    if (call_.scalars.size() != static_cast<size_t>(s_.scalars))
      fail(ErrorKind::value, "got ", call_.scalars.size(), " scalars, expected ", s_.scalars);
  }

  void find_element() {
    for (size_t i = 0; i < s_.tensors.size(); ++i) {
      const Tensor& t = call_.tensors[i];
      if (s_.tensors[i].kind != Kind::element || !t.present()) continue;
      if (!is_floating(t.dtype))
        fail(ErrorKind::type, s_.tensors[i].name, " is of ", dtype_name(t.dtype),
             ", expected float64, float32, bfloat16 or float16");
      element_ = t.dtype;
      return;
    }
  }

  DType expected(Kind kind) const {
    if (kind == Kind::index) return DType::i64;
    return kind == Kind::wide ? wide_type(element_) : element_;
  }

  void check_tensor(const Argument& a, const Tensor& t) {
    if (!t.present()) {
      if (a.need == Need::optional) return;
      fail(ErrorKind::value, a.name, " is missing");
    }
    if (t.dtype != expected(a.kind)) [[unlikely]]
      fail(ErrorKind::type, a.name, " is of ", dtype_name(t.dtype), ", expected ",
           dtype_name(expected(a.kind)));
    check_sizes(a, t);
  }

  void check_sizes(const Argument& a, const Tensor& t) {
    const char* letters = a.sizes;
    int d = 0;
    if (*letters == '+') {
      ++letters;
      if (rank(letters) + 1 == t.ndim) {
        if (t.size[0] != 2)
          fail(ErrorKind::value, a.name, " has size ", t.size[0],
               " at dimension 0, expected 2: a statistic and its rest");
        d = 1;
      }
    }
    if (rank(letters) != t.ndim - d) [[unlikely]]
      fail(ErrorKind::value, a.name, " has ", t.ndim, " dimensions, expected ", rank(letters), " [",
           letters, "]");
    for (; *letters != 0; ++letters, ++d) {
      int64_t& size = sizes_.of(*letters);
      if (size < 0) size = t.size[d];
      if (size != t.size[d]) [[unlikely]]
        fail(ErrorKind::value, a.name, " [", a.sizes, "] has size ", t.size[d], " at dimension ", d,
             ", expected ", size);
    }
  }

  static int rank(const char* letters) {
    int n = 0;
    while (letters[n] != 0) ++n;
    return n;
  }

  const char *op_, *function_;
  const Signature& s_;
  const Call& call_;
  DType element_ = DType::f32;
  Sizes sizes_;
};

}  // namespace

void check_signature(const char* op, const char* function, const Signature& s, const Call& call) {
  Check(op, function, s, call).run();
}

void check_together(const char* op, const Call& call, int tensor, int other, const char* names) {
  check(call.tensor(tensor).present() == call.tensor(other).present(), ErrorKind::value, op, ": ",
        names, " go together");
}

void check_bounds(const char* op, const char* name, const Tensor& bounds, int64_t batch,
                  int64_t tokens) {
  check(batch == 1, ErrorKind::value, op, ": packed sequences are one batch entry, got ", batch);
  check(bounds.size[0] > 0, ErrorKind::value, op, ": ", name, " is empty, expected [N + 1]");
  if (!bounds.data || bounds.device != Device::cpu) return;
  const Ref<const int64_t, 1> at = bounds.ref<1>().as<const int64_t>();
  int64_t before = 0;
  for (int64_t n = 0; n < at.size[0]; ++n) {
    check(at(n) >= before && at(n) <= tokens, ErrorKind::value, op, ": ", name, " is ", at(n),
          " at ", n, ", expected bounds that increase from 0 to at most ", tokens);
    before = at(n);
  }
}

void check_narrow(const char* op, const char* name, int64_t size) {
  check(size <= std::numeric_limits<int32_t>::max(), ErrorKind::value, op, ": ", name, " is ", size,
        ", expected less than 2^31");
}

}  // namespace hw
