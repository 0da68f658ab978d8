#include "mechanisms/infini/params.h"

#include <algorithm>
#include <cmath>

#include "core/offsets.h"
#include "kernels/attention_shapes.h"

namespace everlong::infini {

void read_common(Settings& s, Options& o) {
  o.update = s.choice("update", "linear", {"linear", "delta"}) == "delta" ? Update::kDelta
                                                                          : Update::kLinear;
  o.delta_z =
      s.choice("delta_z", "paper", {"paper", "armt"}) == "armt" ? DeltaZ::kArmt : DeltaZ::kPaper;
  o.empty =
      s.choice("empty", "bypass", {"bypass", "zero"}) == "zero" ? Empty::kZero : Empty::kBypass;
  o.rope_theta = s.number("rope_theta", 10000, 1, 1e30);
  o.bptt_segments = s.integer("bptt_segments", 0, 0, std::int64_t{1} << 40);
}

Status validate(const Options& o, std::int64_t key_dim) {
  if (o.segment < 1 || o.segment > (std::int64_t{1} << 30))
    return invalid_argument("infini: segment = ", o.segment,
                            "; the tokens of a segment are 1 to 2^30");
  if (o.delta_z == DeltaZ::kArmt && o.update != Update::kDelta)
    return invalid_argument(
        "infini: delta_z = \"armt\" belongs to update = \"delta\"; the linear rule has z as the "
        "paper writes it");
  if (!std::isfinite(o.scale) || o.scale < 0)
    return invalid_argument("infini: scale = ", o.scale, "; a finite number > 0 is needed");
  if (o.rope != Rope::kNone && key_dim % 2 != 0)
    return invalid_argument("infini: rope turns pairs, the key dim ", key_dim,
                            " is odd; choose rope = \"none\" or an even dim");
  if (o.bptt_segments < 0)
    return invalid_argument("infini: bptt_segments = ", o.bptt_segments,
                            "; segments that gradients go back, or 0 for all");
  return {};
}

std::int64_t Params::position_after(std::int64_t n) const {
  const std::int64_t end = position(n) + length(n), segment = options.segment;
  return options.commit_last ? (end + segment - 1) / segment * segment : end;
}

Status read_shapes(Shape q, Shape k, Shape v, Params& p) {
  if (q.size() != 4 || k.size() != 4 || v.size() != 4)
    return invalid_argument("infini: q, k, v have shapes ", brackets(q), ", ", brackets(k), ", ",
                            brackets(v), "; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1] || k[3] != q[3] || k[2] != v[2])
    return invalid_argument("infini: q ", brackets(q), ", k ", brackets(k), ", v ", brackets(v),
                            " do not fit; [B, T, H, K], [B, T, G, K], [B, T, G, V] are needed");
  p.batch = q[0];
  p.tokens = q[1];
  p.heads = q[2];
  p.kv_heads = k[2];
  p.key_dim = q[3];
  p.value_dim = v[3];
  return {};
}

Status validate(const Params& p) {
  if (p.batch < 1 || p.tokens < 0 || p.key_dim < 1 || p.value_dim < 1)
    return invalid_argument("infini: batch ", p.batch, " of ", p.tokens, " tokens, key dim ",
                            p.key_dim, ", value dim ", p.value_dim,
                            "; at least one row and dims >= 1 are needed (no tokens are legal)");
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0)
    return invalid_argument("infini: ", p.heads, " query heads cannot share ", p.kv_heads,
                            " key/value heads; a multiple of ",
                            std::max<std::int64_t>(p.kv_heads, 1), ", at least one, is needed");
  EVERLONG_RETURN_IF_ERROR(validate(p.options, p.key_dim));
  EVERLONG_RETURN_IF_ERROR(check_offsets(p.cu_seqlens, p.batch, p.tokens).at("infini"));
  if (p.positions.empty()) return {};
  if (static_cast<std::int64_t>(p.positions.size()) != p.sequences())
    return invalid_argument("infini: state position has ", p.positions.size(), " entries for ",
                            p.sequences(), " sequences; one each is needed");
  for (std::size_t n = 0; n < p.positions.size(); ++n)
    if (p.positions[n] < 0)
      return invalid_argument("infini: state position[", n, "] = ", p.positions[n],
                              "; tokens fed so far, >= 0, are needed");
  return {};
}

double scale_of(const Options& options, std::int64_t key_dim) {
  return options.scale > 0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(key_dim));
}

double memory_bytes(std::int64_t kv_heads, std::int64_t key_dim, std::int64_t value_dim) {
  return 4.0 * static_cast<double>(kv_heads) * static_cast<double>(key_dim) *
         static_cast<double>(value_dim + 1);
}

MemoryTable memory_table(std::int64_t layers, std::int64_t kv_heads, std::int64_t dim,
                         std::int64_t segment) {
  constexpr double kMemorized = 65000;
  const double row = 2.0 * static_cast<double>(dim * kv_heads);  // a key and a value of every head
  MemoryTable t;
  t.infini = memory_bytes(kv_heads, dim, dim) / 4 * static_cast<double>(layers);
  t.local = t.transformer_xl = row * static_cast<double>(segment * layers);
  t.memorizing = kMemorized * row + t.transformer_xl;
  return t;
}

}  // namespace everlong::infini
