// The products of one chunk.
#if defined(EVERLONG_LIGHTNING_CHUNK_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_LIGHTNING_CHUNK_INL
#undef EVERLONG_LIGHTNING_CHUNK_INL
#else
#define EVERLONG_LIGHTNING_CHUNK_INL
#endif

#include "mechanisms/lightning/kernel_cpu_pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::lightning::cpu {
namespace HWY_NAMESPACE {

// How S moves over a chunk, with X = (diag(w) K)^T V.
enum class Update {
  kNone,     // nobody reads it any more
  kReplace,  // X: there was no S
  kFactor,   // factor S + X
  kAdd,      // S + (factor S + X), factor from expm1: next to 1 fp32 has no room for a small slope
};
// Below this loss in a chunk S is added to. Above, the rounding of the factor, 3e-8, has no time to
// add up: after 30 chunks what it multiplied is gone.
constexpr double kLongMemory = 0.03;

// A chunk's operands in the workspace. Columns of v, S and o are cut into panels (pack_panels).
struct Chunk {
  std::int64_t tokens, key_dim;
  const float* q;       // [tokens, kQueryStride]
  const float* k_cols;  // [key_dim, kChunk]
  const float* k_rows;  // [tokens, k_stride], times w
  std::int64_t k_stride;
  float* scores;  // [tokens, kScoreStride]
  const float* decays;
  const float* cross;  // a_i: cross[i] = exp(-s (i + lead)) lies at cross[-i]
  float score_scale, cross_scale;
  bool has_state, stream;
  Update update;
  float factor;
};

// scores = scale (q k^T .* D); row i is valid up to the end of the vector that holds column i.
template <int kVectors>
struct ScoreTiles {
  const Chunk& c;
  std::int64_t first_col;
  template <int kRows>
  HWY_INLINE void run(std::int64_t i0) const {
    if (i0 + kRows <= first_col) return;
    if (kVectors == 2 && i0 + kRows <= first_col + kWidth)
      ScoreTiles<1>{c, first_col}.template compute<kRows>(i0);
    else
      compute<kRows>(i0);
  }
  template <int kRows>
  HWY_INLINE void compute(std::int64_t i0) const {
    const Tag d;
    const hn::RebindToSigned<Tag> di;
    Tile<kRows, kVectors> tile;
    set_zero(tile);
    accumulate<kRows, kVectors>(c.q + i0 * kQueryStride, kQueryStride, 1, c.k_cols + first_col,
                                kChunk, c.key_dim, tile);
    const Vec scale = hn::Set(d, c.score_scale);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = i0 + i;
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t col = first_col + v * kWidth;
        // Selected, not multiplied by zero: tokens to come may hold anything.
        const auto future = hn::Gt(hn::Iota(di, static_cast<std::int32_t>(col)),
                                   hn::Set(di, static_cast<std::int32_t>(row)));
        const Vec decay = hn::Mul(hn::LoadU(d, c.decays + kChunk - row + col), scale);
        hn::Store(hn::IfThenZeroElse(hn::RebindMask(d, future), hn::Mul(tile.sum[i][v], decay)), d,
                  c.scores + row * kScoreStride + col);
      }
    }
  }
};

// o = diag(a) q S + scores v, one panel; or from rows q S that are there already.
template <int kVectors, class T>
struct OutputTiles {
  const Chunk& c;
  Ahead& ahead;
  const float *v, *state, *across;
  std::int64_t across_stride;
  T* o;
  std::int64_t o_stride, cols;
  template <int kRows>
  HWY_INLINE void run(std::int64_t i0) const {
    Tile<kRows, kVectors> tile;
    set_zero(tile);
    ahead.advance(kRows * (c.key_dim + i0));
    if (c.has_state) {
      if (across == nullptr)
        accumulate<kRows, kVectors>(c.q + i0 * kQueryStride, kQueryStride, 1, state,
                                    kVectors * kWidth, c.key_dim, tile);
      else
        load_tile(across + i0 * across_stride, across_stride, tile);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec a = hn::Set(Tag(), c.cross[-(i0 + i)] * c.cross_scale);
#pragma GCC unroll 4
        for (int x = 0; x < kVectors; ++x) tile.sum[i][x] = hn::Mul(tile.sum[i][x], a);
      }
    }
    accumulate<kRows, kVectors>(c.scores + i0 * kScoreStride, kScoreStride, 1, v, kVectors * kWidth,
                                i0 + kRows, tile);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int x = 0; x < kVectors; ++x)
        store_some(tile.sum[i][x], o + (i0 + i) * o_stride + x * kWidth, cols - x * kWidth,
                   c.stream);
  }
};

// S of one panel moves on. What is kept of S comes first, so that the products, which follow each
// other without a break, hide its way from the cache.
template <int kVectors, Update kUpdate>
struct StateTiles {
  const Chunk& c;
  Ahead& ahead;
  const float* v;
  float* state;
  template <int kRows>
  HWY_INLINE void run(std::int64_t i0) const {
    const Tag d;
    constexpr std::int64_t kStride = kVectors * kWidth;
    Tile<kRows, kVectors> tile;
    float* s = state + i0 * kStride;
    if constexpr (kUpdate == Update::kReplace) {
      set_zero(tile);
    } else {
      load_tile(s, kStride, tile);
      scale_tile(hn::Set(d, c.factor), tile);
    }
    ahead.advance(kRows * c.tokens);
    accumulate<kRows, kVectors>(c.k_rows + i0, 1, c.k_stride, v, kStride, c.tokens, tile);
    if constexpr (kUpdate == Update::kAdd) add_tile(s, kStride, tile);
    store_tile(tile, s, kStride);
  }
};

// out = S u^T, [key_dim, kChunk]: u S^T the other way round, so that S need not be transposed.
// u_cols [value_dim, kChunk].
template <int kVectors>
struct AcrossTiles {
  const float *state, *u_cols;
  std::int64_t key_dim, value_dim, col;
  Ahead& ahead;
  float* out;
  template <int kRows>
  HWY_INLINE void run(std::int64_t i0) const {
    Tile<kRows, kVectors> tile;
    set_zero(tile);
    ahead.advance(kRows * value_dim);
    for (std::int64_t panel = 0; panel < value_dim; panel += kPanel) {
      const float *s = state + panel * key_dim, *u = u_cols + panel * kChunk + col;
      const std::int64_t depth = HWY_MIN(kPanel, value_dim - panel);
      if (depth > kWidth)
        accumulate<kRows, kVectors>(s + i0 * kPanel, kPanel, 1, u, kChunk, depth, tile);
      else
        accumulate<kRows, kVectors>(s + i0 * kWidth, kWidth, 1, u, kChunk, depth, tile);
    }
    store_tile(tile, out + i0 * kChunk + col, kChunk);
  }
};

// One panel of columns of o, then of S.
template <int kVectors, class T>
HWY_NOINLINE void run_panel(const Chunk& c, Ahead& ahead, const float* v, float* state, T* o,
                            std::int64_t o_stride, std::int64_t cols) {
  if (o != nullptr)
    for_each_tile(c.tokens,
                  OutputTiles<kVectors, T>{c, ahead, v, state, nullptr, 0, o, o_stride, cols});
  switch (c.update) {
    case Update::kNone:
      break;
    case Update::kReplace:
      for_each_tile(c.key_dim, StateTiles<kVectors, Update::kReplace>{c, ahead, v, state});
      break;
    case Update::kFactor:
      for_each_tile(c.key_dim, StateTiles<kVectors, Update::kFactor>{c, ahead, v, state});
      break;
    case Update::kAdd:
      for_each_tile(c.key_dim, StateTiles<kVectors, Update::kAdd>{c, ahead, v, state});
      break;
  }
}

// One panel of columns of p.
template <int kVectors, class T>
HWY_NOINLINE void run_panel_across(const Chunk& c, Ahead& ahead, const float* v,
                                   const float* across, std::int64_t across_stride, T* p,
                                   std::int64_t p_stride, std::int64_t cols) {
  for_each_tile(c.tokens, OutputTiles<kVectors, T>{c, ahead, v, nullptr, across, across_stride, p,
                                                   p_stride, cols});
}

inline HWY_NOINLINE void compute_across(const float* state, const float* u_cols,
                                        std::int64_t tokens, std::int64_t key_dim,
                                        std::int64_t value_dim, Ahead& ahead, float* out) {
  for (std::int64_t col = 0; col < tokens; col += kPanel) {
    if (tokens - col > kWidth)
      for_each_tile(key_dim, AcrossTiles<2>{state, u_cols, key_dim, value_dim, col, ahead, out});
    else
      for_each_tile(key_dim, AcrossTiles<1>{state, u_cols, key_dim, value_dim, col, ahead, out});
  }
}

inline HWY_NOINLINE void compute_scores(const Chunk& c) {
  for (std::int64_t col = 0; col < c.tokens; col += kPanel) {
    if (c.tokens - col > kWidth)
      for_each_tile(c.tokens, ScoreTiles<2>{c, col});
    else
      for_each_tile(c.tokens, ScoreTiles<1>{c, col});
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::lightning::cpu
HWY_AFTER_NAMESPACE();
#endif
