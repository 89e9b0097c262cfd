// SPDX-License-Identifier: Apache-2.0
// Attention of listed queries to listed keys, host side: the lists of its functions, checks, and
// what each backend can take.
#include "ops/routing_attention/routing_attention.h"

#include "ops/routing_attention/routing_attention_simt_layout.h"
#include "ops/routing_attention/routing_attention_sm80_layout.h"
#include "softmax/arguments.h"

#include "core/host/registry.h"

namespace hw::routing_attention {
namespace {

constexpr const char* kName = "routing_attention";

// The regions of rows or of keys.
template <Lists Routing::* lists>
consteval auto region_grid(const char* columns, const char* height, const char* width,
                           const char* rows, const char* image) {
  return arguments(
      integer(columns, [](Routing& r) -> auto& { return (r.*lists).grid.columns; }),
      integer(height, [](Routing& r) -> auto& { return (r.*lists).grid.height; }),
      integer(width, [](Routing& r) -> auto& { return (r.*lists).grid.width; }),
      integer(rows, [](Routing& r) -> auto& { return (r.*lists).grid.rows_of_image; }),
      integer(image, [](Routing& r) -> auto& { return (r.*lists).grid.columns_of_image; }));
}

// Results: where w and row statistics are, slots or tokens.
constexpr auto kListArguments = arguments(
    in(
        "rows", [](Routing& r) -> auto& { return r.rows.entries; }, "B Hq G Nq")
        .index(),
    in("keys", [](Routing& r) -> auto& { return r.keys.entries; }, "B Hq G Nk").index().optional());
constexpr auto kRoutingScalars = std::tuple_cat(
    region_grid<&Routing::rows>("row_columns", "row_height", "row_width", "row_image_height",
                                "row_image_width"),
    region_grid<&Routing::keys>("key_columns", "key_height", "key_width", "key_image_height",
                                "key_image_width"),
    arguments(flag("by_slot", &Routing::by_slot), flag("pad_keys", &Routing::pad_keys),
              flag("mask_self", &Routing::mask_self), number("mean_eps", &Routing::mean_eps)));

constexpr auto kForwardList = call_list<ForwardParams>(
    softmax::kScoreArguments, kListArguments,
    softmax::forward_arguments("B Results Hq Dv", "B Hq Results"), kRoutingScalars);

constexpr auto kBackwardList = call_list<BackwardParams>(
    softmax::kScoreArguments, kListArguments, softmax::backward_inputs("B Hq Results"),
    in("slots", &BackwardParams::slots, "B Results Hq Dv").optional(),
    in("factor", &BackwardParams::factor, "B Sq Hq").wide().optional(), softmax::kGradients,
    kRoutingScalars);

// ---- Checks -------------------------------------------------------------------------------------

// The engine's sequences are groups.
template <class P>
void complete(P& p, const Call&) {
  softmax::complete_scores(p);
  // Regions that do not fit the call are left to the checks.
  const auto slots = [](const Lists& l, int64_t tokens) {
    return l.grid.within(tokens) ? l.slots() : 0;
  };
  p.max_q = slots(p.rows, p.q.size[1]);
  p.max_k = p.keys ? slots(p.keys, p.k.size[1]) : p.k.size[1];
}

void check_lists(const char* which, const Lists& l, int64_t tokens) {
  const RegionGrid& g = l.grid;
  check(g.within(tokens), ErrorKind::value, "routing_attention: an image of ", g.rows_of_image,
        " x ", g.columns_of_image, " tokens in regions of ", g.height, " x ", g.width,
        " does not fit the ", tokens, " tokens of the ", which);
}

template <class P>
void check_routing(const P& p, const Call& call) {
  softmax::check_scores(kName, p, call);
  check(!p.packed() && p.activation == softmax::Activation::softmax, ErrorKind::value,
        "routing_attention: sequences are not packed, the activation is softmax");
  check(bool(p.v), ErrorKind::value, "routing_attention: v is missing");
  const bool listed = bool(p.keys);
  check_lists("rows", p.rows, p.q.size[1]);
  if (listed) check_lists("keys", p.keys, p.k.size[1]);
  check(listed || (p.groups() == 1 && !p.by_slot), ErrorKind::value,
        "routing_attention: all keys go with one list of rows");
  check(!p.pad_keys || p.left < 0, ErrorKind::value,
        "routing_attention: keys of zeros, which all rows see, go with no window to the left");
  check(listed || !p.mask_self, ErrorKind::value, "routing_attention: mask_self is of listed keys");
}

// Results of rows, `size` of them, where they are there: at slots or at tokens.
template <class P>
void check_results(const P& p, bool present, int64_t size) {
  if (!present) return;
  const int64_t results = p.by_slot ? p.groups() * p.rows.slots() : p.q.size[1];
  check(size == results, ErrorKind::value, "routing_attention: results of ", size,
        " rows, expected ", results);
}

void check_forward(const ForwardParams& p, const Call& call) {
  check_routing(p, call);
  softmax::check_forward(kName, p);
  check(!p.identity_mix && !p.mass_keys, ErrorKind::value,
        "routing_attention: rows of lists have no identity_mix and no mass");
  check_results(p, bool(p.w), p.w.size[1]);
  check_results(p, bool(p.row), p.row.size[2]);
  check(!p.by_slot || (p.w && p.row), ErrorKind::value,
        "routing_attention: by slot w and row are made");
  check(!p.by_slot || !p.head_gate, ErrorKind::value,
        "routing_attention: by slot there is no head_gate");
}

void check_backward(const BackwardParams& p, const Call& call) {
  check_routing(p, call);
  check_narrow(kName, "the number of columns of v", p.v.size[3]);
  softmax::check_statistic(kName, p, p.row);
  check_results(p, bool(p.row), p.row.size[2]);
  check(bool(p.slots) == p.by_slot && bool(p.delta) != p.by_slot, ErrorKind::value,
        "routing_attention: by slot comes slots, otherwise delta");
  // A key stands in several lists, and several times in one.
  const auto of_all_keys = [&](const char* what, bool wanted) {
    check(!wanted || !p.keys, ErrorKind::not_implemented, "routing_attention: ", what,
          " of listed keys is not implemented; without lists of keys it is");
  };
  of_all_keys("d_bias", bool(p.d_bias));
  of_all_keys("d_key_bias", bool(p.d_key_bias));
  of_all_keys("d_key_gain", bool(p.d_key_gain));
  check(!p.factor || call.element == DType::f32 || call.element == DType::f64, ErrorKind::type,
        "routing_attention: a factor of d_w comes beside elements of ", dtype_name(call.element),
        ", expected float32 or float64");
}

// ---- Backends -----------------------------------------------------------------------------------

// Numbers of tokens and slots have 32 bits on CUDA.
template <class P>
std::string why_not_many(const P& p) {
  const RoutingSizes s = shape_of(p);
  const int64_t slots = max_of(s.row_slots, s.key_slots);
  const int64_t most = max_of(max_of(s.rows, s.keys), s.groups * slots);
  if (most >= INT32_MAX || max_of(p.rows.grid.count(), s.key_regions) >= INT32_MAX)
    return concat("there are ", most, " tokens or slots, and their numbers have 32 bits");
  return {};
}

std::string why_not_forward(const ForwardParams& p, const Call&, Backend b) {
  return b == Backend::cpu ? std::string() : why_not_many(p);
}

std::string why_not_backward(const BackwardParams& p, const Call&, Backend b) {
  if (b == Backend::cpu) return {};
  if (p.factor) return "routing_attention multiplies d_w by a factor on the CPU alone";
  return why_not_many(p);
}

// Compared with the widths of the tensor-core instances; the other backends take any.
template <class P>
int width(const P& p, const Call&, Backend b) {
  return b == Backend::sm80 ? static_cast<int>(max_of(p.q.size[3], p.v.size[3])) : 0;
}

int64_t forward_bytes(const ForwardParams& p, const Call& call, Backend b) {
  if (b == Backend::sm80) return sm80::workspace_bytes(p, call.context.multiprocessors);
  return workspace_bytes(p, call, b);
}
int64_t backward_bytes(const BackwardParams& p, const Call& call, Backend) {
  return workspace_bytes(p, call.element);
}

constexpr Questions<ForwardParams> kForward{.complete = &complete<ForwardParams>,
                                            .check = &check_forward,
                                            .why_not = &why_not_forward,
                                            .dim = &width<ForwardParams>,
                                            .workspace = &forward_bytes};
constexpr Questions<BackwardParams> kBackward{.complete = &complete<BackwardParams>,
                                              .check = &check_backward,
                                              .why_not = &why_not_backward,
                                              .dim = &width<BackwardParams>,
                                              .workspace = &backward_bytes};

constexpr Function kFunctions[] = {function<kForwardList, kForward>("forward"),
                                   function<kBackwardList, kBackward>("backward")};

}  // namespace

extern const Operator kOperator;
const Operator kOperator = {kName, kFunctions};

}  // namespace hw::routing_attention
