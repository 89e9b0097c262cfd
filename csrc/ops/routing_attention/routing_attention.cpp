// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys, host side: arguments of a call, checks, and what each
// backend can take.
#include "ops/routing_attention/routing_attention.h"

#include "ops/routing_attention/routing_attention_simt_layout.cuh"
#include "ops/routing_attention/routing_attention_sm80_layout.cuh"

#include "core/arguments.h"
#include "core/registry.h"

namespace hw::routing_attention {
namespace {

enum Function { kForward = 0, kBackward = 1 };
constexpr const char* kFunctions[] = {"forward", "backward"};

void read_lists(Arguments& a, Routing& r) {
  r.rows.blocks = a.output<4>().as<const int64_t>();
  r.keys.blocks = a.output<4>().as<const int64_t>();
}

void read_routing(Arguments& a, Routing& r) {
  r.rows.cells = read_cells(a);
  r.keys.cells = read_cells(a);
  r.by_slot = a.flag(), r.pad_keys = a.flag(), r.mask_self = a.flag();
  r.mean_eps = a.scalar();
}

// The engine's sequences are groups.
template <class Params>
void set_lengths(Params& p) {
  p.max_q = p.rows ? p.rows.slots() : p.q.size[1];
  p.max_k = p.keys ? p.keys.slots() : p.k.size[1];
}

void check_lists(const char* which, const Lists& l, const attention::ScoreParams& p,
                 int64_t tokens) {
  if (!l) return;
  check(l.blocks.size[0] == p.batch() && l.blocks.size[1] == p.query_heads(), ErrorKind::value,
        "routing_attention: lists of ", which, " are of [", l.blocks.size[0], ", ",
        l.blocks.size[1], "] batch entries and heads, expected [", p.batch(), ", ", p.query_heads(),
        "]");
  const Cells& c = l.cells;
  check(c.columns > 0 && c.height > 0 && c.width > 0 &&
            c.rows_of_image * c.columns_of_image == tokens,
        ErrorKind::value, "routing_attention: an image of ", c.rows_of_image, " x ",
        c.columns_of_image, " tokens in cells of ", c.height, " x ", c.width, " does not fit the ",
        tokens, " tokens of the ", which);
}

template <class Params>
void check_params(const Params& p) {
  attention::check_scores(p);
  check(!p.packed() && p.activation == attention::Activation::softmax, ErrorKind::value,
        "routing_attention: sequences are not packed, the activation is softmax");
  check(static_cast<bool>(p.rows), ErrorKind::value, "routing_attention: rows have no lists");
  check_lists("rows", p.rows, p, p.q.size[1]);
  check_lists("keys", p.keys, p, p.k.size[1]);
  check(!p.keys || p.keys.blocks.size[2] == p.groups(), ErrorKind::value,
        "routing_attention: ", p.groups(), " lists of rows, ", p.keys.blocks.size[2], " of keys");
  check(p.keys || (p.groups() == 1 && !p.by_slot), ErrorKind::value,
        "routing_attention: all keys go with one list of rows");
  check(!p.keys || !(p.bias || p.key_bias || p.key_gain || p.row_temperature || p.softcap > 0),
        ErrorKind::value, "routing_attention: listed keys go with plain scores");
}

void check_backward(const Call& call) {
  const BackwardParams p = backward_params(call);
  check_params(p);
  if (!p.factor) return;
  const Tensor &factor = call.tensor(kFactor), &q = call.tensor(kBackwardQ);
  check(factor.dtype == q.dtype && (q.dtype == DType::f32 || q.dtype == DType::f64),
        ErrorKind::type, "routing_attention: a factor of d_w is ", dtype_name(factor.dtype),
        " beside elements of ", dtype_name(q.dtype), ", expected float32 or float64 for both");
  for (int n = 0; n < 3; ++n)
    check(factor.size[n] == q.size[n], ErrorKind::value, "routing_attention: factor has size ",
          factor.size[n], " at dimension ", n, ", expected ", q.size[n]);
}

void check_call(int function, const Call& call) {
  if (function == kForward)
    check_params(forward_params(call));
  else
    check_backward(call);
}

std::string why_not(int function, Backend backend, const Call& call) {
  if (function == kBackward && backend != Backend::cpu && backward_params(call).factor)
    return "routing_attention multiplies d_w by a factor on the CPU alone";
  return {};
}

// Compared with the widths of the tensor-core instances; the other backends take any.
int width(int function, Backend backend, const Call& call) {
  return backend == Backend::sm80 ? sm80::dim(function, call) : 0;
}

int64_t workspace(int function, Backend backend, const Call& call) {
  return backend == Backend::cpu ? 0 : workspace_bytes(function == kBackward, call);
}

}  // namespace

ForwardParams forward_params(const Call& call) {
  Arguments a(call);
  ForwardParams p;
  read_lists(a, p);
  read_routing(a, p);
  attention::read_forward(a, p);
  set_lengths(p);
  return p;
}

BackwardParams backward_params(const Call& call) {
  Arguments a(call);
  BackwardParams p;
  read_lists(a, p);
  p.slots = a.input<4>();
  const Ref<const void, 3> factor = a.input<3>();
  read_routing(a, p);
  attention::read_backward(a, p);
  p.factor = factor;
  set_lengths(p);
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {"routing_attention", kFunctions, &check_call, &why_not, &width,
                            &workspace};

}  // namespace hw::routing_attention
