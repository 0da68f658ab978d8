// Rows of features, once per SIMD target.
#if defined(EVERLONG_MECHANISMS_INFINI_KERNEL_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_MECHANISMS_INFINI_KERNEL_CPU_TILE_INL_H_
#undef EVERLONG_MECHANISMS_INFINI_KERNEL_CPU_TILE_INL_H_
#else
#define EVERLONG_MECHANISMS_INFINI_KERNEL_CPU_TILE_INL_H_
#endif

#include "kernels/cpu/softmax_tile-inl.h"
#include "mechanisms/infini/kernel_cpu_simd.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::infini::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace cpu::HWY_NAMESPACE;  // NOLINT: the pieces of the same target
using cpu::MutableRows;
using cpu::Rows;

// Rows of a tile: what stays in the first cache with its panel of columns.
inline constexpr std::int64_t kTile = 96;
// A matrix of K rows is read and summed in whole blocks of rows.
inline constexpr std::int64_t kMostRows = cpu::kMostDim + 12;
inline constexpr float kNothing = 1e-30F;  // a divisor below it is that of an empty memory

inline std::int64_t lanes_of() { return static_cast<std::int64_t>(hn::Lanes(F())); }

// Where x <= 0 (or NaN) exp(x), else `positive`.
HWY_INLINE V below_zero(F d, V x, V positive) {
  return hn::IfThenElse(hn::Gt(x, hn::Zero(d)), positive, exp2(d, hn::Mul(x, hn::Set(d, kLog2e))));
}
// sigma(x) = max(x, 0) + exp(min(x, 0)), and its slope.
HWY_INLINE V sigma(F d, V x) { return below_zero(d, x, hn::Add(x, hn::Set(d, 1.0F))); }
HWY_INLINE V sigma_slope(F d, V x) { return below_zero(d, x, hn::Set(d, 1.0F)); }

// Rows of (token, head of the group) of [P, C, heads, D].
template <class View, class Void = decltype(View::data)>
auto group_rows(const View& x, std::int64_t p, std::int64_t g, std::int64_t group) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Void>>, const std::byte, std::byte>;
  const std::int64_t at = p * x.strides[0] + g * group * x.strides[2];
  return cpu::BasicRows<std::remove_pointer_t<Void>>{
      static_cast<Byte*>(x.data) + at * static_cast<std::int64_t>(info(x.dtype).bytes), x.dtype,
      x.strides[1], x.strides[2], group};
}

// A contiguous fp32 matrix [rows][columns] into to [rows][kRow], zeros behind its columns; with
// `divide` row i by divide[i], zeros where that is 0.
inline void copy_matrix(const float* from, std::int64_t rows, std::int64_t columns,
                        const float* divide, float* to) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float factor = divide == nullptr ? 1.0F : divide[i] == 0 ? 0.0F : 1.0F / divide[i];
    for (std::int64_t c = 0; c < padded(columns); ++c)
      to[i * kRow + c] = c < columns && factor != 0 ? factor * from[i * columns + c] : 0.0F;
  }
}
// The same, transposed: to [columns][kRow].
inline void transpose_matrix(const float* from, std::int64_t rows, std::int64_t columns,
                             const float* divide, float* to) {
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t i = 0; i < padded(rows); ++i) {
      const bool there = i < rows && (divide == nullptr || divide[i] != 0);
      const float factor = divide == nullptr || !there ? 1.0F : 1.0F / divide[i];
      to[c * kRow + i] = there ? factor * from[i * columns + c] : 0.0F;
    }
}

// c [rows][kRow] = a [rows][kRow] b [depth][kRow].
inline void multiply_rows(const float* a, const float* b, std::int64_t rows, std::int64_t depth,
                          std::int64_t columns, float* c) {
  for (std::int64_t r = 0; r < rows; r += kRowBlock) {
    for (std::int64_t i = 0; i < kRowBlock; ++i)
      std::memset(c + (r + i) * kRow, 0, static_cast<std::size_t>(padded(columns)) * sizeof(float));
    add_product<kRow, 1>(a + r * kRow, b, depth, columns, c + r * kRow, kRow, nullptr);
  }
}
// c [K][kRow] += a^T b, a [depth][kRow] with K columns, b [depth][kRow].
inline void add_outer(const float* a, const float* b, std::int64_t depth, std::int64_t key_dim,
                      std::int64_t columns, float* c) {
  for (std::int64_t i = 0; i < key_dim; i += kRowBlock)
    add_product<1, kRow>(a + i, b, depth, columns, c + i * kRow, kRow, nullptr);
}

inline float dot_rows(const float* a, const float* b, std::int64_t wide) {
  const F d;
  V sum = hn::Zero(d);
  for (std::int64_t c = 0; c < wide; c += lanes_of())
    sum = hn::MulAdd(hn::LoadU(d, a + c), hn::LoadU(d, b + c), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

inline bool all_zero(const float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    if (x[i] != 0) return false;
  return true;
}

}  // namespace everlong::infini::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggle
