#include "mechanisms/megalodon/op.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/offsets.h"
#include "mechanisms/megalodon/op_cpu.h"
#include "mechanisms/megalodon/op_cpu_attention.h"
#include "mechanisms/megalodon/op_rows.h"

namespace everlong::megalodon {
namespace {

std::int64_t sequences_of(const at::Tensor& x, Offsets offsets) {
  return offsets.empty() ? x.size(0) : static_cast<std::int64_t>(offsets.size()) - 1;
}

void check_sequences(const at::Tensor& x, Offsets offsets, std::int64_t states, const char* what) {
  throw_if_error(check_offsets(offsets, x.size(0), x.size(1)).at("megalodon"));
  if (states != sequences_of(x, offsets))
    throw_if_error(invalid_argument("megalodon: ", what, " of ", states,
                                    " sequences for a call of ", sequences_of(x, offsets)));
}

at::Tensor tokens(const at::Tensor& x, std::int64_t begin, std::int64_t length) {
  return x.narrow(1, begin, length);
}

// A packed line of no sequences at all has no parts.
at::Tensor cat_tokens(const std::vector<at::Tensor>& parts, const at::Tensor& like) {
  return parts.empty() ? like.clone() : at::cat(parts, 1);
}

bool by_kernel(const at::Tensor& x, Path path) {
  if (path == Path::kComposite) return false;
  const Status status = check_cpu_kernel(x);
  if (path == Path::kCpu) throw_if_error(status);
  return status.ok();
}

Attend attend_by(const at::Tensor& z, Path path) {
  if (path == Path::kComposite) return attend_composite;
  const Status status = check_attention_kernel(z);
  if (path == Path::kCpu) throw_if_error(status);
  return status.ok() ? attend_by_cpu_kernel : attend_composite;
}

}  // namespace

at::ScalarType working_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

NormState rows_of(const NormState& state, std::int64_t first, std::int64_t count) {
  return {{state.counts.begin() + first, state.counts.begin() + first + count},
          state.mean_NG.narrow(0, first, count),
          state.var_NG.narrow(0, first, count)};
}

ChunkCache rows_of(const ChunkCache& cache, std::int64_t first, std::int64_t count) {
  return {{cache.counts.begin() + first, cache.counts.begin() + first + count},
          cache.k_NPHK.narrow(0, first, count),
          cache.v_NPHV.narrow(0, first, count)};
}

NormState joined(const std::vector<NormState>& states) {
  NormState all;
  std::vector<at::Tensor> means, vars;
  for (const NormState& s : states) {
    all.counts.insert(all.counts.end(), s.counts.begin(), s.counts.end());
    means.push_back(s.mean_NG);
    vars.push_back(s.var_NG);
  }
  all.mean_NG = at::cat(means, 0);
  all.var_NG = at::cat(vars, 0);
  return all;
}

ChunkCache joined(const std::vector<ChunkCache>& caches) {
  if (caches.size() == 1) return caches.front();
  ChunkCache all;
  for (const ChunkCache& c : caches)
    all.counts.insert(all.counts.end(), c.counts.begin(), c.counts.end());
  const std::int64_t rows = *std::ranges::max_element(all.counts);
  std::vector<at::Tensor> keys, values;
  const auto padded = [&](const at::Tensor& x) {
    return at::constant_pad_nd(x, {0, 0, 0, 0, 0, rows - x.size(1)});
  };
  for (const ChunkCache& c : caches) {
    keys.push_back(padded(c.k_NPHK));
    values.push_back(padded(c.v_NPHV));
  }
  all.k_NPHK = at::cat(keys, 0);
  all.v_NPHV = at::cat(values, 0);
  return all;
}

Normalised timestep_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         double eps, Offsets offsets, const NormState& state, Path path) {
  check_sequences(x, offsets, state.mean_NG.size(0), "norm statistics");
  if (by_kernel(x, path)) {
    const NormWeights norm{weight, bias, eps};
    NormAveraged out = norm_cema_by_cpu_kernel(x, &norm, nullptr, offsets, state, {});
    return {std::move(out.u_BTD), std::move(out.norm)};
  }
  if (offsets.empty()) return composite_timestep_norm(x, weight, bias, eps, state);
  std::vector<at::Tensor> ys;
  std::vector<NormState> states;
  for_each_sequence(offsets, [&](std::int64_t n, std::int64_t begin, std::int64_t length) {
    Normalised one =
        composite_timestep_norm(tokens(x, begin, length), weight, bias, eps, rows_of(state, n, 1));
    ys.push_back(one.y_BTD);
    states.push_back(std::move(one.state));
  });
  return {cat_tokens(ys, x), states.empty() ? state : joined(states)};
}

Averaged cema(const at::Tensor& x, const EmaWeights& weights, Offsets offsets, const at::Tensor& h,
              Path path) {
  check_sequences(x, offsets, h.defined() ? h.size(0) : sequences_of(x, offsets),
                  "moving averages");
  if (by_kernel(x, path)) {
    NormAveraged out = norm_cema_by_cpu_kernel(x, nullptr, &weights, offsets, {}, h);
    return {std::move(out.e_BTD), std::move(out.h_NDM2)};
  }
  if (offsets.empty()) return composite_cema(x, weights, h);
  std::vector<at::Tensor> ys, hs;
  for_each_sequence(offsets, [&](std::int64_t n, std::int64_t begin, std::int64_t length) {
    const Averaged one =
        composite_cema(tokens(x, begin, length), weights, h.defined() ? h.narrow(0, n, 1) : h);
    ys.push_back(one.y_BTD);
    hs.push_back(one.h_NDM2);
  });
  return {cat_tokens(ys, x), hs.empty() ? h : at::cat(hs, 0)};
}

std::string_view path_taken(const at::Tensor& x, Path path) {
  return by_kernel(x, path) ? "cpu" : "composite";
}

NormAveraged norm_cema(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       double eps, const EmaWeights& weights, Offsets offsets,
                       const NormState& norm, const at::Tensor& h, Path path) {
  if (by_kernel(x, path)) {
    check_sequences(x, offsets, norm.mean_NG.size(0), "norm statistics");
    check_sequences(x, offsets, h.defined() ? h.size(0) : sequences_of(x, offsets),
                    "moving averages");
    const NormWeights of_norm{weight, bias, eps};
    return norm_cema_by_cpu_kernel(x, &of_norm, &weights, offsets, norm, h);
  }
  Normalised u = timestep_norm(x, weight, bias, eps, offsets, norm, Path::kComposite);
  Averaged e = cema(u.y_BTD, weights, offsets, h, Path::kComposite);
  return {std::move(u.y_BTD), std::move(e.y_BTD), std::move(u.state), std::move(e.h_NDM2)};
}

Attended chunk_attention(const at::Tensor& z, const at::Tensor& v, const at::Tensor& gamma,
                         const at::Tensor& beta, const AttentionShape& shape, Offsets offsets,
                         const ChunkCache& cache, Path path) {
  const Attend attend = attend_by(z, path);
  check_sequences(z, offsets, cache.k_NPHK.size(0), "chunk caches");
  if (offsets.empty()) return composite_chunk_attention(z, v, gamma, beta, shape, cache, attend);
  std::vector<at::Tensor> outputs;
  std::vector<ChunkCache> caches;
  for_each_sequence(offsets, [&](std::int64_t n, std::int64_t begin, std::int64_t length) {
    Attended one = composite_chunk_attention(tokens(z, begin, length), tokens(v, begin, length),
                                             gamma, beta, shape, rows_of(cache, n, 1), attend);
    outputs.push_back(one.o_BTHV);
    caches.push_back(std::move(one.cache));
  });
  return {cat_tokens(outputs, v), caches.empty() ? cache : joined(caches)};
}

std::int64_t cache_capacity(std::int64_t rows, std::int64_t chunk) {
  std::int64_t capacity = rows > 0 ? 64 : 0;
  while (capacity < rows) capacity *= 2;
  return std::min(capacity, chunk);
}

at::Tensor chunk_attention_appending(const at::Tensor& z, const at::Tensor& v,
                                     const at::Tensor& gamma, const at::Tensor& beta,
                                     const AttentionShape& shape, Offsets offsets,
                                     ChunkCache& cache, bool shared) {
  const Attend attend = attend_by(z, Path::kAuto);
  check_sequences(z, offsets, cache.k_NPHK.size(0), "chunk caches");
  const std::int64_t N = cache.k_NPHK.size(0);
  const auto length = [&](std::int64_t n) {
    const auto at = static_cast<std::size_t>(n);
    return offsets.empty() ? z.size(1) : offsets[at + 1] - offsets[at];
  };
  std::int64_t rows = 0, kept = 0;
  bool begins_chunk = false;
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t past = cache.counts[static_cast<std::size_t>(n)], after = past + length(n);
    rows = std::max({rows, past, std::min(after, shape.chunk)});
    kept = std::max(kept, after % shape.chunk);
    begins_chunk |= length(n) > 0 && (past == 0 || after > shape.chunk);
  }
  // New buffers of `size` rows with what the old ones hold.
  const auto renew = [&](std::int64_t size) {
    for (at::Tensor* x : {&cache.k_NPHK, &cache.v_NPHV}) {
      auto sizes = x->sizes().vec();
      sizes[1] = size;
      const at::Tensor next = at::zeros(sizes, x->options());
      const std::int64_t same = std::min(size, x->size(1));
      next.narrow(1, 0, same).copy_(x->narrow(1, 0, same));
      *x = next;
    }
  };
  if (shared || begins_chunk || rows > cache.k_NPHK.size(1))
    renew(cache_capacity(rows, shape.chunk));
  at::Tensor o;
  if (offsets.empty()) {
    o = append_and_attend(z, v, gamma, beta, shape, cache, attend);
  } else {
    std::vector<at::Tensor> outputs;
    for_each_sequence(offsets, [&](std::int64_t n, std::int64_t begin, std::int64_t count) {
      outputs.push_back(append_and_attend(tokens(z, begin, count), tokens(v, begin, count), gamma,
                                          beta, shape, rows_of(cache, n, 1), attend));
    });
    o = cat_tokens(outputs, v);
  }
  // What is left depends on what is held alone, not on how it came there: the size, and zeros
  // behind the rows of chunks that ended (in buffers of their own, as somebody may hold those
  // rows).
  std::vector<std::int64_t> ended;
  for (std::int64_t n = 0; n < N; ++n) {
    auto& count = cache.counts[static_cast<std::size_t>(n)];
    if (length(n) > 0 && count + length(n) >= shape.chunk) ended.push_back(n);
    count = (count + length(n)) % shape.chunk;
  }
  const std::int64_t size = cache_capacity(kept, shape.chunk);
  if (!ended.empty() || size != cache.k_NPHK.size(1)) renew(size);
  for (const std::int64_t n : ended) {
    const std::int64_t held = cache.counts[static_cast<std::size_t>(n)];
    cache.k_NPHK[n].narrow(0, held, size - held).zero_();
    cache.v_NPHV[n].narrow(0, held, size - held).zero_();
  }
  return o;
}

}  // namespace everlong::megalodon
