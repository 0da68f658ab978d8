#include "mechanisms/landmark/op_composite.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "mechanisms/landmark/op_naive.h"
#include "mechanisms/landmark/op_sections.h"
#include "ops/kernel_call.h"

namespace everlong::landmark {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Scores of a tile and its query rows. CPU: a tile passes through its steps in a core's cache. GPU:
// large enough to fill it.
constexpr std::int64_t kCpuScores = std::int64_t{1} << 18, kGpuScores = std::int64_t{1} << 26;
// Sections so uneven that padding takes this many times the keys are left to the plain form.
constexpr double kMostPadding = 8;
constexpr std::int64_t kCpuRows = 64, kGpuRows = 1024;

struct CompositeCall {
  SectionTable table;
  double scale = 1;
  bool drop_empty = false;
};

// Some rows of the batch, key heads and query tokens.
struct Tile {
  std::int64_t row, rows, head, heads, token, tokens;
  std::int64_t sections;  // seen by any of its queries
};

// Legend of a tile: b rows, g key heads, t tokens, R query heads a key head, C sections, W tokens.
struct Weights {
  at::Tensor inside;  // [b, g, t, R, C, W] share of a token inside its section
  at::Tensor gate;    // [b, g, t, R, C] share of the section
  at::Tensor past;    // bool [b, 1, t, 1, C]: sections seen through their landmark
  at::Tensor lse;     // [b, g, t, R]
};

struct Shapes {
  std::int64_t B, T, G, R, K, V;
  at::ScalarType operand, wide;

  Shapes(const at::Tensor& q_BTGRK, const at::Tensor& v_BSGV)
      : B(q_BTGRK.size(0)),
        T(q_BTGRK.size(1)),
        G(q_BTGRK.size(2)),
        R(q_BTGRK.size(3)),
        K(q_BTGRK.size(4)),
        V(v_BSGV.size(3)),
        wide(q_BTGRK.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {
    // The CPU multiplies low precision in fp32, which is faster there.
    operand = q_BTGRK.is_cuda() ? q_BTGRK.scalar_type() : wide;
  }

  // a b of [b, g, m, k] and [b, g, k, n], with wide results.
  at::Tensor product(const at::Tensor& a, const at::Tensor& b) const {
    const at::Tensor x = a.to(operand).flatten(0, 1), y = b.to(operand).flatten(0, 1);
    const at::Tensor z = operand == wide ? at::bmm(x, y) : at::bmm(x, y, wide);
    return z.unflatten(0, {a.size(0), a.size(1)});
  }
};

std::vector<Tile> make_tiles(const Shapes& s, const SectionTable& table, bool gpu) {
  std::vector<Tile> tiles;
  const std::int64_t tokens = std::clamp<std::int64_t>((gpu ? kGpuRows : kCpuRows) / s.R, 1,
                                                       std::max<std::int64_t>(s.T, 1));
  for (std::int64_t t = 0; t < s.T; t += tokens) {
    const std::int64_t count = std::min(tokens, s.T - t);
    const std::int64_t sections = table.seen[static_cast<std::size_t>(t + count - 1)];
    const std::int64_t scores = count * s.R * sections * (table.width + 1);
    const std::int64_t matrices = std::max<std::int64_t>(
        (gpu ? kGpuScores : kCpuScores) / std::max<std::int64_t>(scores, 1), 1);
    const std::int64_t rows = std::clamp<std::int64_t>(matrices / s.G, 1, s.B);
    const std::int64_t heads = std::min(matrices, s.G);
    for (std::int64_t b = 0; b < s.B; b += rows)
      for (std::int64_t g = 0; g < s.G; g += heads)
        tiles.push_back(
            {b, std::min(rows, s.B - b), g, std::min(heads, s.G - g), t, count, sections});
  }
  return tiles;
}

// [B, T, G, R, D] -> [b, g, t R, D].
at::Tensor queries_of(const at::Tensor& x, const Tile& tile) {
  return x.narrow(0, tile.row, tile.rows)
      .narrow(1, tile.token, tile.tokens)
      .narrow(2, tile.head, tile.heads)
      .transpose(1, 2)
      .flatten(2, 3);
}
void put_queries(const at::Tensor& to, const Tile& tile, const at::Tensor& x) {
  to.narrow(0, tile.row, tile.rows)
      .narrow(1, tile.token, tile.tokens)
      .narrow(2, tile.head, tile.heads)
      .copy_(x.unflatten(2, {tile.tokens, to.size(3)}).transpose(1, 2));
}
// [B, G, rows, D] -> [b, g, count, D].
at::Tensor keys_of(const at::Tensor& x, const Tile& tile, std::int64_t count) {
  return x.narrow(0, tile.row, tile.rows).narrow(1, tile.head, tile.heads).narrow(2, 0, count);
}

struct Keys {
  at::Tensor content, landmark;  // [B, G, C W, K], [B, G, C, K]
  at::Tensor values;             // [B, G, C W, V]
};

Keys lay_out(const at::Tensor& k, const at::Tensor& v, const SectionTable& table) {
  return {rows_at(k, table.content), rows_at(k, table.landmark), rows_at(v, table.content)};
}

Weights weigh(const CompositeCall& call, const Shapes& s, const Keys& keys, const at::Tensor& q,
              const Tile& tile) {
  const std::int64_t C = tile.sections, W = call.table.width;
  const at::Tensor own = call.table.query.narrow(0, tile.token, tile.tokens).view({1, 1, -1, 1, 1});
  const auto positions = [&](const at::Tensor& x, std::int64_t count) {
    return x.narrow(0, tile.row, tile.rows).narrow(1, 0, count);
  };
  const auto as_rows = [&](const at::Tensor& scores) {
    return scores.unflatten(2, {tile.tokens, s.R}).mul_(call.scale);
  };
  const at::Tensor hidden =
      positions(call.table.content, C * W).view({tile.rows, 1, 1, 1, C, W}).gt(own.unsqueeze(-1));
  Weights w;
  w.past = positions(call.table.landmark, C).view({tile.rows, 1, 1, 1, C}).lt(own);
  at::Tensor scores = as_rows(s.product(q, keys_of(keys.content, tile, C * W).mT()))
                          .unflatten(4, {C, W})
                          .masked_fill_(hidden, -kInfinity);
  const at::Tensor top = finite_base(scores.amax(-1));
  w.inside = scores.sub_(top.unsqueeze(-1)).exp_();
  const at::Tensor sum = w.inside.sum(-1);
  // A section counts as one key: a past one by its landmark's score, the own one by its tokens'.
  at::Tensor whole = at::where(w.past, as_rows(s.product(q, keys_of(keys.landmark, tile, C).mT())),
                               sum.log().add_(top));
  if (call.drop_empty)
    whole.masked_fill_(positions(call.table.empty, C).view({tile.rows, 1, 1, 1, C}), -kInfinity);
  const at::Tensor base = finite_base(whole.amax(-1));
  w.gate = whole.sub_(base.unsqueeze(-1)).exp_();
  const at::Tensor total = w.gate.sum(-1), blind = total.eq(0);
  w.lse = total.log().add_(base);
  w.gate.div_(total.masked_fill(blind, 1).unsqueeze(-1));
  w.inside.div_(sum.masked_fill(sum.eq(0), 1).unsqueeze(-1));
  return w;
}

at::Tensor flat_weights(const Weights& w) {
  return w.inside.mul(w.gate.unsqueeze(-1)).flatten(4, 5).flatten(2, 3);  // [b, g, t R, C W]
}

struct CompositeFunction : torch::autograd::Function<CompositeFunction> {
  // q [B, T, G, R, K], k [B, S, G, K], v [B, S, G, V] -> out [B, T, G, R, V], lse [B, T, G, R, 1].
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const CompositeCall& call) {
    const Shapes s(q, v);
    const Keys keys = lay_out(k, v, call.table);
    const at::Tensor out = at::empty({s.B, s.T, s.G, s.R, s.V}, q.options());
    const at::Tensor lse = at::empty({s.B, s.T, s.G, s.R, 1}, q.options().dtype(s.wide));
    for (const Tile& tile : make_tiles(s, call.table, q.is_cuda())) {
      const Weights w = weigh(call, s, keys, queries_of(q, tile), tile);
      const std::int64_t count = tile.sections * call.table.width;
      put_queries(out, tile, s.product(flat_weights(w), keys_of(keys.values, tile, count)));
      put_queries(lse, tile, w.lse.flatten(2, 3).unsqueeze(-1));
    }
    ctx->save_for_backward({q, k, v, out});
    ctx->saved_data["call"] = hold(call);
    return {out, lse};
  }

  // README.md, section 2: the slopes of own tokens, of past sections' tokens and of their gates.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3];
    const auto call = held<CompositeCall>(ctx->saved_data["call"]);
    const Shapes s(q, v);
    const SectionTable& table = call.table;
    const Keys keys = lay_out(k, v, table);
    const auto wide = q.options().dtype(s.wide);
    const std::int64_t C = table.sections, W = table.width;
    const at::Tensor dq = at::empty(q.sizes(), wide);
    const at::Tensor dk = at::zeros({s.B, s.G, C * W + C, s.K}, wide),
                     dv = at::zeros({s.B, s.G, C * W + C, s.V}, wide);
    const at::Tensor go_all = grads[0].defined() ? grads[0] : at::zeros_like(out);
    for (const Tile& tile : make_tiles(s, table, q.is_cuda())) {
      const at::Tensor rows = queries_of(q, tile), go = queries_of(go_all, tile);
      const std::int64_t seen = tile.sections, count = seen * W;
      const Weights w = weigh(call, s, keys, rows, tile);
      const at::Tensor slope = s.product(go, keys_of(keys.values, tile, count).mT())
                                   .unflatten(3, {seen, W})
                                   .unflatten(2, {tile.tokens, s.R});
      at::Tensor along =
          (go.to(s.wide) * queries_of(out, tile)).sum(-1).unflatten(2, {tile.tokens, s.R});
      if (grads[1].defined())
        along = along - queries_of(grads[1], tile).squeeze(-1).unflatten(2, {tile.tokens, s.R});
      along = along.unsqueeze(-1);
      const at::Tensor within = w.inside.mul(slope).sum(-1);
      const at::Tensor base = at::where(w.past, within, along);
      const at::Tensor p = flat_weights(w);
      const at::Tensor ds = slope.sub(base.unsqueeze(-1)).flatten(4, 5).flatten(2, 3).mul_(p);
      const at::Tensor dz =
          w.gate.mul(within.sub(along)).masked_fill_(w.past.logical_not(), 0).flatten(2, 3);
      put_queries(dq, tile,
                  s.product(ds, keys_of(keys.content, tile, count))
                      .add_(s.product(dz, keys_of(keys.landmark, tile, seen))));
      keys_of(dk, tile, count).add_(s.product(ds.mT(), rows));
      keys_of(dk.narrow(2, C * W, C), tile, seen).add_(s.product(dz.mT(), rows));
      keys_of(dv, tile, count).add_(s.product(p.mT(), go));
    }
    const auto dtype = q.scalar_type();
    return {dq.mul_(call.scale).to(dtype),
            keys_from(dk, table).mul_(call.scale).to(dtype),
            keys_from(dv, table).to(dtype),
            {}};
  }
};

}  // namespace

Attended attention_by_composite(const at::Tensor& q_BTHK, const at::Tensor& k_BSGK,
                                const at::Tensor& v_BSGV, const at::Tensor& marks_BS, double scale,
                                bool drop_empty) {
  const std::int64_t G = k_BSGK.size(2), R = q_BTHK.size(2) / G;
  const auto wide = q_BTHK.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (q_BTHK.size(1) == 0) {
    const std::int64_t B = q_BTHK.size(0), H = q_BTHK.size(2);
    return {at::empty({B, 0, H, v_BSGV.size(3)}, q_BTHK.options()),
            at::empty({B, H, 0}, q_BTHK.options().dtype(wide))};
  }
  const CompositeCall call{make_sections(marks_BS, q_BTHK.size(1), q_BTHK.device()), scale,
                           drop_empty};
  if (padding_of(call.table) > kMostPadding) {
    const Grouped grouped =
        naive_weights(q_BTHK.to(wide), k_BSGK.to(wide), marks_BS, scale, drop_empty);
    return {weighted_values(grouped.weights, v_BSGV.to(wide)).to(q_BTHK.scalar_type()),
            grouped.lse};
  }
  const auto result = CompositeFunction::apply(q_BTHK.unflatten(2, {G, R}), k_BSGK, v_BSGV, call);
  return {result[0].flatten(2, 3), result[1].squeeze(-1).flatten(2, 3).transpose(1, 2)};
}

}  // namespace everlong::landmark
