#include "mechanisms/longnet/op.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/offsets.h"
#include "mechanisms/longnet/op_cpu.h"
#include "mechanisms/longnet/op_lattice.h"
#include "ops/kernel_call.h"

namespace everlong::longnet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the backward needs beside tensors.
struct Call {
  Geometry geometry;
  double scale = 1, xpos_base = 0;
  std::int64_t position = 0;

  Fade fade(const at::Tensor& q) const {
    if (xpos_base <= 0) return {};
    return make_fade(q.size(3), xpos_base, q.options().dtype(wide_of(q.scalar_type())));
  }
};

// Adds the softmax over one pattern's keys, (o, lse), to that over the patterns before it.
void merge(const Piece& piece, const PanelResult& part, const at::Tensor& out,
           const at::Tensor& lse) {
  const at::Tensor rows = piece.queries(out), sums = piece.queries(lse);
  const at::Tensor own = part.lse_MR1.view(sums.sizes());
  const at::Tensor all = at::logaddexp(sums, own);
  const at::Tensor blind = all == -kInfinity;
  const at::Tensor before = (sums - all).exp_().masked_fill_(blind, 0),
                   mine = (own - all).exp_().masked_fill_(blind, 0);
  rows.copy_(rows * before + part.out_MRV.view(rows.sizes()) * mine);
  sums.copy_(all);
}

struct DilatedFunction : torch::autograd::Function<DilatedFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, at::TensorList past_k, at::TensorList past_v,
                            const Call& call) {
    const auto wide = q.options().dtype(wide_of(q.scalar_type()));
    const std::int64_t B = q.size(0), T = q.size(1), H = q.size(2);
    const at::Tensor out = at::zeros({B, T, H, v.size(3)}, wide);
    const at::Tensor lse = at::full({B, T, H, 1}, -kInfinity, wide);
    const Fade fade = call.fade(q);
    const Past past{call.position, past_k.vec(), past_v.vec()};
    variable_list kept;  // detached: the patterns' own outputs
    for (const Piece& piece : make_pieces(call.geometry, H, k.size(2), call.position, T)) {
      Panel panel = make_panel(piece, q, k, v, past, call.geometry, call.scale);
      if (call.xpos_base > 0) panel.fade = &fade;
      const PanelResult part = panel_forward(panel);
      merge(piece, part, out, lse);
      if (call.geometry.detached) kept.push_back(part.out_MRV);
    }
    const at::Tensor result = out.to(v.scalar_type());
    variable_list saved = {q, k, v, result, lse};
    saved.insert(saved.end(), past_k.begin(), past_k.end());
    saved.insert(saved.end(), past_v.begin(), past_v.end());
    saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = hold(call);
    ctx->saved_data["past"] = static_cast<std::int64_t>(past_k.size());
    return result;
  }

  // README.md, section 3: every pattern's probabilities relative to the whole softmax.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3];
    const Call call = held<Call>(ctx->saved_data["call"]);
    const auto patterns = static_cast<std::size_t>(ctx->saved_data["past"].toInt());
    const Past past{call.position,
                    {saved.begin() + 5, saved.begin() + 5 + patterns},
                    {saved.begin() + 5 + patterns, saved.begin() + 5 + 2 * patterns}};
    const at::ScalarType wide = wide_of(q.scalar_type());
    const auto zeros_like = [&](const at::Tensor& x) {
      return at::zeros(x.sizes(), x.options().dtype(wide));
    };
    const at::Tensor go = grads[0];
    // Rows that saw nothing have no weights.
    const at::Tensor lse = saved[4].masked_fill(saved[4] == -kInfinity, kInfinity);
    const at::Tensor delta = (go.to(wide) * out.to(wide)).sum(-1, true);
    variable_list d = {zeros_like(q), zeros_like(k), zeros_like(v)};
    for (const auto* list : {&past.k, &past.v})
      for (const at::Tensor& x : *list) d.push_back(zeros_like(x));
    const Fade fade = call.fade(q);
    std::size_t own = 5 + 2 * patterns;
    for (const Piece& piece :
         make_pieces(call.geometry, q.size(2), k.size(2), call.position, q.size(1))) {
      Panel panel = make_panel(piece, q, k, v, past, call.geometry, call.scale);
      if (call.xpos_base > 0) panel.fade = &fade;
      const at::Tensor rows = packed_rows(piece, go);
      const at::Tensor along = call.geometry.detached ? (rows.to(wide) * saved[own++]).sum(-1, true)
                                                      : packed_rows(piece, delta);
      const PanelGrads part =
          panel_backward(panel, rows.to(panel.q_MRK.scalar_type()), packed_rows(piece, lse), along);
      const at::Tensor to_q = piece.queries(d[0]);
      to_q.add_(part.q_MRK.view(to_q.sizes()));
      add_keys(piece, part.k_MSK, d[1], patterns > 0 ? d[3 + piece.pattern] : at::Tensor());
      add_keys(piece, part.v_MSV, d[2],
               patterns > 0 ? d[3 + patterns + piece.pattern] : at::Tensor());
    }
    for (std::size_t i = 0; i < d.size(); ++i) d[i] = d[i].to(q.scalar_type());
    d.emplace_back();  // of the call
    return d;
  }

  static void add_keys(const Piece& piece, const at::Tensor& part_MSD, const at::Tensor& fresh,
                       const at::Tensor& past) {
    const LatticeRun& run = piece.run;
    const at::Tensor to = piece.keys(fresh);
    to.add_(part_MSD.narrow(1, run.past, run.keys).view(to.sizes()));
    if (run.past == 0) return;
    const at::Tensor to_past = piece.past(past);
    to_past.add_(part_MSD.narrow(1, 0, run.past).view(to_past.sizes()));
  }
};

double checked_scale(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const Options& options, const Past& past) {
  Params params;
  const auto shape = [](const at::Tensor& x) { return Shape(x.sizes().data(), x.sizes().size()); };
  throw_if_error(read_shapes(shape(q), shape(k), shape(v), params));
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                        q.is_floating_point() && q.device() == k.device() &&
                        q.device() == v.device(),
                    "longnet: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ",
                    v.scalar_type(), " on ", q.device(), ", ", k.device(), ", ", v.device(),
                    "; one floating-point dtype and one device are needed");
  params.geometry = options.geometry;
  params.scale = options.scale.value_or(default_scale(std::max<std::int64_t>(q.size(3), 1)));
  if (past.position > 0) {
    params.positions.assign(static_cast<std::size_t>(q.size(0)), past.position);
    TORCH_CHECK_VALUE(past.k.size() == options.geometry.patterns.size() &&
                          past.v.size() == options.geometry.patterns.size(),
                      "longnet: a past at position ", past.position, " has buffers of ",
                      past.k.size(), " patterns; ", options.geometry.patterns.size(),
                      " are needed");
  }
  throw_if_error(validate(params));
  return params.scale;
}

bool takes_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const Options& options) {
  if (options.path == Path::kComposite) return false;
  const Status status = check_cpu_kernel(q, k, v, options);
  if (options.path == Path::kCpu) throw_if_error(status);
  return status.ok();
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const Options& options, const Past& past) {
  const double scale = checked_scale(q, k, v, options, past);
  if (takes_cpu_kernel(q, k, v, options))
    return attention_by_cpu_kernel(q, k, v, options, scale, past);
  return DilatedFunction::apply(q, k, v, at::TensorList(past.k), at::TensorList(past.v),
                                Call{options.geometry, scale, options.xpos_base, past.position});
}

at::Tensor attention_packed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            std::span<const std::int64_t> offsets, const Options& options) {
  checked_scale(q, k, v, options, {});
  throw_if_error(check_offsets(offsets, q.size(0), q.size(1)).at("longnet"));
  std::vector<at::Tensor> parts;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    const std::int64_t begin = offsets[n], count = offsets[n + 1] - begin;
    if (count > 0)
      parts.push_back(attention(q.narrow(1, begin, count), k.narrow(1, begin, count),
                                v.narrow(1, begin, count), options));
  }
  return parts.empty() ? attention(q, k, v, options) : at::cat(parts, 1);
}

Past advanced(const Past& past, const at::Tensor& k, const at::Tensor& v, const Geometry& geometry,
              std::span<const std::int64_t> capacity) {
  const std::int64_t T = k.size(1), G = k.size(2), end = past.position + T;
  Past next{end, {}, {}};
  for (std::size_t i = 0; i < geometry.patterns.size(); ++i) {
    const Pattern& pattern = geometry.patterns[i];
    const auto [w, r] = pattern;
    const std::int64_t start = end > 0 ? (end - 1) / w * w : 0;
    const auto classes = head_classes(geometry.offset_rule, G, r);
    // Row l of head g for every head, from the old buffer and then from the call.
    const auto extend = [&, w = w, r = r](const at::Tensor& old, const at::Tensor& x) {
      std::vector<at::Tensor> parts;
      std::vector<std::int64_t> order(static_cast<std::size_t>(G));
      std::int64_t place = 0;
      for (const HeadClass& c : classes) {
        const std::int64_t last_head = c.first + c.step * (c.count - 1) + 1;
        const std::int64_t held = rows_held(pattern, c.offset, end);
        const std::int64_t kept =
            T == 0 ? held
                   : lattice_rows(std::max<std::int64_t>(past.position - start, 0), c.offset, r);
        std::vector<at::Tensor> rows;
        if (kept > 0) rows.push_back(old.slice(1, c.first, last_head, c.step).narrow(2, 0, kept));
        if (held > kept) {
          const std::int64_t first = start + c.offset + kept * r - past.position;
          rows.push_back(x.slice(2, c.first, last_head, c.step)
                             .slice(1, first, first + (held - kept - 1) * r + 1, r)
                             .transpose(1, 2));
        }
        rows.push_back(at::zeros({x.size(0), c.count, capacity[i] - held, x.size(3)}, x.options()));
        parts.push_back(at::cat(rows, 2));
        for (std::int64_t n = 0; n < c.count; ++n)
          order[static_cast<std::size_t>(c.first + n * c.step)] = place++;
      }
      const at::Tensor all = at::cat(parts, 1);
      if (std::ranges::is_sorted(order)) return all;
      return all.index_select(1, at::tensor(order, at::kLong).to(x.device()));
    };
    const at::Tensor none;
    next.k.push_back(extend(past.k.empty() ? none : past.k[i], k));
    next.v.push_back(extend(past.v.empty() ? none : past.v[i], v));
  }
  return next;
}

std::string_view path_taken(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Options& options) {
  return takes_cpu_kernel(q, k, v, options) ? "cpu" : "composite";
}

}  // namespace everlong::longnet
