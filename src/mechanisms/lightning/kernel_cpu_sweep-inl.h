// One pass over the tokens of some heads (struct Sweep), by chunks.
#if defined(EVERLONG_LIGHTNING_SWEEP_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_LIGHTNING_SWEEP_INL
#undef EVERLONG_LIGHTNING_SWEEP_INL
#else
#define EVERLONG_LIGHTNING_SWEEP_INL
#endif

#include <hwy/cache_control.h>

#include "mechanisms/lightning/kernel_cpu_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::lightning::cpu {
namespace HWY_NAMESPACE {

// S between its own layout and the panels: visit(row, first column, columns, numbers in the panel
// and their capacity).
template <class Visit>
HWY_INLINE void for_each_row_of_panels(std::int64_t key_dim, std::int64_t value_dim, float* panels,
                                       const Visit& visit) {
  for (std::int64_t panel = 0; panel < value_dim; panel += kPanel) {
    const std::int64_t width = value_dim - panel > kWidth ? kPanel : kWidth;
    for (std::int64_t row = 0; row < key_dim; ++row, panels += width)
      visit(row, panel, HWY_MIN(width, value_dim - panel), panels, width);
  }
}

HWY_INLINE void load_state(const Sweep& s, float* state) {
  const Matrix<const float> in = s.state_in;
  for_each_row_of_panels(
      s.key_dim, s.value_dim, state,
      [&](std::int64_t row, std::int64_t col, std::int64_t count, float* to, std::int64_t width) {
        std::memset(to, 0, static_cast<std::size_t>(width) * sizeof(float));
        if (in.data == nullptr) return;
        const float* from = in.data + row * in.row_stride + col * in.col_stride;
        if (in.col_stride == 1)
          std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
        else
          for (std::int64_t c = 0; c < count; ++c) to[c] = from[c * in.col_stride];
      });
}

HWY_INLINE void store_state(const Sweep& s, float* state) {
  const Matrix<float> out = s.state_out;
  for_each_row_of_panels(s.key_dim, s.value_dim, state,
                         [&](std::int64_t row, std::int64_t col, std::int64_t count,
                             const float* from, std::int64_t /*width*/) {
                           float* to = out.data + row * out.row_stride + col * out.col_stride;
                           if (out.col_stride == 1)
                             std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
                           else
                             for (std::int64_t c = 0; c < count; ++c)
                               to[c * out.col_stride] = from[c];
                         });
}

// What one thread computes a chunk in; `state` is the head's whose turn it is. The second half
// serves p.
struct Buffers {
  Buffers(float* at, std::int64_t key_dim, std::int64_t value_dim) {
    const std::int64_t K = padded(key_dim), V = padded(value_dim);
    const auto take = [&](std::int64_t floats) { return std::exchange(at, at + floats); };
    q = take(kChunk * kQueryStride), scores = take(kChunk * kScoreStride);
    k_cols = take(kChunk * K), k_rows = take(kChunk * K), v = take(kChunk * V);
    u = take(kChunk * kQueryStride), u_scores = take(kChunk * kScoreStride);
    u_cols = take(kChunk * V), v_cols = take(kChunk * V), k = take(kChunk * K);
    across_cols = take(kChunk * K), across = take(kChunk * K);
  }
  float* state = nullptr;
  float *q, *scores, *k_cols, *k_rows, *v;
  float *u, *u_scores, *u_cols, *v_cols, *k, *across_cols, *across;
};

// p of one chunk, before S moves on. `c` is o's chunk; k_rows are not weighed yet.
template <class T>
void run_across(const Sweep& s, std::int64_t first, const Chunk& c, const Buffers& b,
                Ahead& ahead) {
  const std::int64_t m = c.tokens, K = s.key_dim, V = s.value_dim;
  Chunk mine = c;
  mine.key_dim = V, mine.q = b.u, mine.k_cols = b.v_cols, mine.scores = b.u_scores;
  mine.stream = s.stream_p;
  // u's buffer holds v until v_cols are made.
  pack_rows(rows_as<T>(s.v, first), m, V, b.u, kQueryStride);
  transpose(b.u, kQueryStride, m, V, b.v_cols, kChunk);
  pack_rows(rows_as<T>(s.u, first), m, V, b.u, kQueryStride);
  pack_panels(Rows<const float>{b.k_rows, c.k_stride}, m, K, b.k, kChunk);
  compute_scores(mine);
  if (c.has_state) {
    transpose(b.u, kQueryStride, m, V, b.u_cols, kChunk);
    compute_across(b.state, b.u_cols, m, K, V, ahead, b.across_cols);
    transpose(b.across_cols, kChunk, K, m, b.across, c.k_stride);
  }
  for (std::int64_t panel = 0; panel < K; panel += kPanel) {
    T* p = static_cast<T*>(s.p.data) + first * s.p.stride + panel;
    const auto run = K - panel > kWidth ? &run_panel_across<2, T> : &run_panel_across<1, T>;
    run(mine, ahead, b.k + panel * kChunk, b.across + panel, c.k_stride, p, s.p.stride, K - panel);
  }
}

// Tokens [first, first + m) of one head; S moves on.
template <class T>
HWY_INLINE void run_chunk(const Sweep& s, const Buffers& b, std::int64_t first, std::int64_t m,
                          Ahead& ahead) {
  const std::int64_t K = s.key_dim, V = s.value_dim, k_stride = padded(K);
  const bool given = s.state_in.data != nullptr, with_o = s.o.data != nullptr;
  const bool last = first + m == s.tokens, add = s.slope * static_cast<double>(m) < kLongMemory;
  const bool has_state = first > 0 || given;
  const double exponent = -s.slope * static_cast<double>(m);
  const Chunk c{.tokens = m,
                .key_dim = K,
                .q = b.q,
                .k_cols = b.k_cols,
                .k_rows = b.k_rows,
                .k_stride = k_stride,
                .scores = b.scores,
                .decays = s.decays,
                .cross = s.decays + kChunk - s.lead,
                .score_scale = s.score_scale,
                .cross_scale = s.cross_scale,
                .has_state = has_state,
                .stream = s.stream_o,
                .update = last && s.state_out.data == nullptr ? Update::kNone
                          : !has_state                        ? Update::kReplace
                          : add                               ? Update::kAdd
                                                              : Update::kFactor,
                .factor = static_cast<float>(add ? std::expm1(exponent) : std::exp(exponent))};
  pack_rows(rows_as<T>(s.k, first), m, K, b.k_rows, k_stride);
  pack_panels(rows_as<T>(s.v, first), m, V, b.v, kChunk);
  if (with_o) {
    pack_rows(rows_as<T>(s.q, first), m, K, b.q, kQueryStride);
    transpose(b.k_rows, k_stride, m, K, b.k_cols, kChunk);
    compute_scores(c);
  }
  if (s.p.data != nullptr) run_across<T>(s, first, c, b, ahead);
  // w_j = exp(-s (m - lead - j)): by the chunk's true length.
  if (c.update != Update::kNone)
    weigh_rows(b.k_rows, k_stride, m, K, s.decays + kChunk - (m - s.lead), s.update_scale);
  for (std::int64_t panel = 0; panel < V; panel += kPanel) {
    T* o = with_o ? static_cast<T*>(s.o.data) + first * s.o.stride + panel : nullptr;
    const auto run = V - panel > kWidth ? &run_panel<2, T> : &run_panel<1, T>;
    run(c, ahead, b.v + panel * kChunk, b.state + panel * K, o, s.o.stride, V - panel);
  }
}

template <class T>
void sweep_tokens(std::span<const Sweep> heads, float* scratch) {
  const Sweep& any = heads.front();
  const std::int64_t K = any.key_dim, V = any.value_dim;
  const std::size_t state_floats = static_cast<std::size_t>(padded(K) * padded(V));
  float* const states = scratch;
  Buffers b(scratch + heads.size() * state_floats, K, V);
  for (std::size_t h = 0; h < heads.size(); ++h)
    if (heads[h].state_in.data != nullptr || any.tokens == 0)
      load_state(heads[h], states + h * state_floats);
  for (std::int64_t first = 0; first < any.tokens; first += kChunk) {
    const std::int64_t m = HWY_MIN(kChunk, any.tokens - first);
    const std::int64_t work = (V + kPanel - 1) / kPanel * (any.o.data != nullptr ? 2 : 1) * m * K;
    for (std::size_t h = 0; h < heads.size(); ++h) {
      const bool end = h + 1 == heads.size();
      Ahead ahead(heads[end ? 0 : h + 1], end ? first + m : first, work, T());
      b.state = states + h * state_floats;
      run_chunk<T>(heads[h], b, first, m, ahead);
    }
  }
  if (any.stream_o || any.stream_p) hwy::FlushStream();
  for (std::size_t h = 0; h < heads.size(); ++h)
    if (heads[h].state_out.data != nullptr) store_state(heads[h], states + h * state_floats);
}

void sweep_any_type(std::span<const Sweep> heads, float* scratch) {
  if (heads.front().dtype == DType::kFloat32)
    sweep_tokens<float>(heads, scratch);
  else
    sweep_tokens<BFloat16>(heads, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::lightning::cpu
HWY_AFTER_NAMESPACE();
#endif
