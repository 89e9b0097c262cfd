// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys, host side: arguments of a call, checks, and what each
// backend can take.
#include "ops/routing_attention/routing_attention.h"

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "ops/routing_attention/routing_attention_sm80_layout.h"

#include "core/host/arguments.h"
#include "core/host/registry.h"

namespace hw::routing_attention {
namespace {

enum Function { kForward = 0, kBackward = 1 };
constexpr const char* kFunctions[] = {"forward", "backward"};

// R: where w and row statistics are, slots or tokens.
constexpr std::array<Argument, 2> kLists{
    {{"row_blocks", "BQGi", Kind::index}, {"key_blocks", "BQGj", Kind::index, Need::optional}}};
constexpr std::array<Argument, 2> kBackwardLists{{{"slots", "BRQV", Kind::element, Need::optional},
                                                  {"factor", "BSQ", Kind::wide, Need::optional}}};
constexpr int kRoutingScalars = 14;
constexpr auto kForwardTensors =
    joined(kLists, joined(softmax::kScoreTensors, softmax::forward_tensors("BRQV", "+BQR")));
constexpr auto kBackwardTensors =
    joined(joined(kLists, kBackwardLists),
           joined(softmax::kScoreTensors, softmax::backward_tensors("+BQR", Need::optional)));
constexpr Signature kSignatures[] = {
    {kForwardTensors, kRoutingScalars + softmax::kScoreScalars + 1},
    {kBackwardTensors, kRoutingScalars + softmax::kScoreScalars}};

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
  p.max_q = p.rows.slots();
  p.max_k = p.keys ? p.keys.slots() : p.k.size[1];
}

void check_lists(const char* which, const Lists& l, int64_t tokens) {
  const Cells& c = l.cells;
  check(c.within(tokens), ErrorKind::value, "routing_attention: an image of ", c.rows_of_image,
        " x ", c.columns_of_image, " tokens in cells of ", c.height, " x ", c.width,
        " does not fit the ", tokens, " tokens of the ", which);
}

template <class Params>
void check_params(const Params& p, const Call& call, int q) {
  softmax::check_scores(call, q);
  check(!call.tensor(q + 6).present() && p.activation == softmax::Activation::softmax,
        ErrorKind::value, "routing_attention: sequences are not packed, the activation is softmax");
  check(call.tensor(q + 8).present(), ErrorKind::value, "routing_attention: v is missing");
  const bool listed = call.tensor(1).present();
  check_lists("rows", p.rows, p.q.size[1]);
  if (listed) check_lists("keys", p.keys, p.k.size[1]);
  check(listed || (p.rows.blocks.size[2] == 1 && !p.by_slot), ErrorKind::value,
        "routing_attention: all keys go with one list of rows");
  bool plain = !(p.softcap > 0);
  for (int i = 2; i < 6; ++i) plain = plain && !call.tensor(q + i).present();
  check(!listed || plain, ErrorKind::value, "routing_attention: listed keys go with plain scores");
}

// Results of rows, tensor `i`, where they are there: at slots or at tokens, which are dimension `d`.
template <class Params>
void check_places(const Params& p, const Tensor& t, int d) {
  if (!t.present()) return;
  const int64_t places = p.by_slot ? p.rows.blocks.size[2] * p.rows.slots() : p.q.size[1];
  check(t.size[d] == places, ErrorKind::value, "routing_attention: results of ", t.size[d],
        " rows, expected ", places);
}

void check_backward(const Call& call) {
  const BackwardParams p = backward_params(call);
  check_params(p, call, kBackwardQ);
  softmax::check_backward(call, kBackwardQ, p);
  const Tensor &slots = call.tensor(2), &factor = call.tensor(kFactor),
               &q = call.tensor(kBackwardQ);
  const Tensor &row = call.tensor(kBackwardQ + 10), &delta = call.tensor(kBackwardQ + 11);
  check_places(p, row, row.ndim - 1);
  check(slots.present() == p.by_slot && delta.present() != p.by_slot, ErrorKind::value,
        "routing_attention: by slot comes slots, otherwise delta");
  check(!factor.present() || factor.dtype == q.dtype, ErrorKind::type,
        "routing_attention: a factor of d_w is ", dtype_name(factor.dtype), " beside elements of ",
        dtype_name(q.dtype), ", expected float32 or float64 for both");
}

void check_forward(const Call& call) {
  const ForwardParams p = forward_params(call);
  check_params(p, call, kForwardQ);
  softmax::check_forward(call, kForwardQ);
  const Tensor &w = call.tensor(kForwardQ + 13), &row = call.tensor(kForwardQ + 14);
  check_places(p, w, 1);
  check_places(p, row, row.ndim - 1);
  check(!p.by_slot || (w.present() && row.present()), ErrorKind::value,
        "routing_attention: by slot w and row are made");
}

void check_call(int function, const Call& call) {
  function == kForward ? check_forward(call) : check_backward(call);
}

std::string why_not(int function, Backend backend, const Call& call) {
  if (backend == Backend::cpu) return {};
  const Shape s = function == kForward ? forward_shape(call) : backward_shape(call);
  const int64_t slots = max_of(s.row_slots, s.key_slots);
  const int64_t most = max_of(max_of(s.rows, s.keys), s.groups * slots);
  if (most >= INT32_MAX || s.key_regions >= INT32_MAX)
    return concat("there are ", most, " tokens or slots, and their numbers have 32 bits");
  if (function == kBackward && call.tensor(kFactor).present())
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
  softmax::read_forward(a, p);
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
  softmax::read_backward(a, p);
  p.factor = factor;
  set_lengths(p);
  return p;
}

extern const Operator kOperator;
const Operator kOperator = {
    "routing_attention", kFunctions, kSignatures, &check_call, &why_not, &width, &workspace};

}  // namespace hw::routing_attention
