// Copies of a chunk into the workspace: fp32, contiguous, in the order in which products read it.
#if defined(EVERLONG_LIGHTNING_PACK_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef EVERLONG_LIGHTNING_PACK_INL
#undef EVERLONG_LIGHTNING_PACK_INL
#else
#define EVERLONG_LIGHTNING_PACK_INL
#endif

#include "mechanisms/lightning/kernel_cpu_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::lightning::cpu {
namespace HWY_NAMESPACE {

template <class T>
HWY_INLINE Rows<const T> rows_as(const Rows<const void>& rows, std::int64_t first) {
  return {static_cast<const T*>(rows.data) + first * rows.stride, rows.stride};
}

// Asks for the tokens of the next chunk or head while this one is computed, a row at a time and
// evenly over the work. Heads interleave in memory, so consecutive rows lie kilobytes apart, where
// no hardware prefetcher follows; many rows at once would fill the miss buffers and stop the
// products' loads. Into the second-level cache: the first is full of S and this chunk.
class Ahead {
 public:
  // work: what the calls of advance() will add up to, at least.
  template <class T>
  HWY_INLINE Ahead(const Sweep& s, std::int64_t first, std::int64_t work, T) {
    if (s.o.data != nullptr) add_rows<T>(s.q, first, s.key_dim);
    add_rows<T>(s.k, first, s.key_dim);
    add_rows<T>(s.v, first, s.value_dim);
    if (s.p.data != nullptr) add_rows<T>(s.u, first, s.value_dim);
    left_ = count_ * HWY_MIN(kChunk, s.tokens - first);
    work_per_row_ = left_ == 0 ? work : work / left_;
  }

  HWY_INLINE void advance(std::int64_t amount) {
    credit_ += amount;
    for (; credit_ >= work_per_row_ && left_ > 0; credit_ -= work_per_row_, --left_) {
      Rows<const char>& row = rows_[next_];
      for (std::int64_t c = 0; c < bytes_[next_]; c += 64) __builtin_prefetch(row.data + c, 0, 2);
      row.data += row.stride;
      next_ = next_ + 1 == count_ ? 0 : next_ + 1;
    }
  }

 private:
  template <class T>
  HWY_INLINE void add_rows(const Rows<const void>& rows, std::int64_t first, std::int64_t cols) {
    constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
    const Rows<const T> typed = rows_as<T>(rows, first);
    rows_[count_] = {reinterpret_cast<const char*>(typed.data), typed.stride * kSize};
    bytes_[count_++] = cols * kSize;
  }

  Rows<const char> rows_[4];
  std::int64_t bytes_[4] = {}, left_ = 0, work_per_row_ = 0, credit_ = 0;
  int count_ = 0, next_ = 0;
};

// [rows, cols] -> [rows, to_stride].
template <class T>
void pack_rows(const Rows<const T>& from, std::int64_t rows, std::int64_t cols, float* to,
               std::int64_t to_stride) {
  const Tag d;
  for (std::int64_t r = 0; r < rows; ++r, to += to_stride) {
    const T* row = from.data + r * from.stride;
    std::int64_t c = 0;
    for (; c + kWidth <= cols; c += kWidth) hn::Store(load_as(d, row + c), d, to + c);
    for (; c < cols; ++c) to[c] = load_one(row + c);
  }
}

// [rows, cols] -> panels of columns, each [capacity, kPanel] or, the last, [capacity, kWidth]. What
// fills up the last vector is zero.
template <class T>
void pack_panels(const Rows<const T>& from, std::int64_t rows, std::int64_t cols, float* to,
                 std::int64_t capacity) {
  const Tag d;
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* row = from.data + r * from.stride;
    for (std::int64_t panel = 0; panel < cols; panel += kPanel) {
      const std::int64_t width = cols - panel > kWidth ? kPanel : kWidth;
      float* out = to + panel * capacity + r * width;
      for (std::int64_t c = panel; c < HWY_MIN(panel + width, cols); c += kWidth, out += kWidth) {
        if (c + kWidth <= cols) {
          hn::Store(load_as(d, row + c), d, out);
        } else {
          for (std::int64_t i = 0; i < kWidth; ++i)
            out[i] = c + i < cols ? load_one(row + c + i) : 0.0F;
        }
      }
    }
  }
}

// [rows, cols] -> [cols, rows], with these strides.
HWY_INLINE void transpose(const float* from, std::int64_t from_stride, std::int64_t rows,
                          std::int64_t cols, float* to, std::int64_t to_stride) {
  std::int64_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> d4;
  for (; r + 4 <= rows; r += 4) {
    const float* row = from + r * from_stride;
    float* out = to + r;
    std::int64_t c = 0;
    for (; c + 4 <= cols; c += 4) {
      const auto r0 = hn::LoadU(d4, row + c), r1 = hn::LoadU(d4, row + from_stride + c),
                 r2 = hn::LoadU(d4, row + 2 * from_stride + c),
                 r3 = hn::LoadU(d4, row + 3 * from_stride + c);
      const auto lower01 = hn::InterleaveLower(d4, r0, r1),
                 upper01 = hn::InterleaveUpper(d4, r0, r1),
                 lower23 = hn::InterleaveLower(d4, r2, r3),
                 upper23 = hn::InterleaveUpper(d4, r2, r3);
      hn::Store(hn::ConcatLowerLower(d4, lower23, lower01), d4, out + c * to_stride);
      hn::Store(hn::ConcatUpperUpper(d4, lower23, lower01), d4, out + (c + 1) * to_stride);
      hn::Store(hn::ConcatLowerLower(d4, upper23, upper01), d4, out + (c + 2) * to_stride);
      hn::Store(hn::ConcatUpperUpper(d4, upper23, upper01), d4, out + (c + 3) * to_stride);
    }
    for (; c < cols; ++c)
      for (int i = 0; i < 4; ++i) out[c * to_stride + i] = row[i * from_stride + c];
  }
#endif
  for (; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

// Row r times weight[r] * scale; cols may run into the padding of a row.
HWY_INLINE void weigh_rows(float* rows, std::int64_t stride, std::int64_t count, std::int64_t cols,
                           const float* weight, float scale) {
  const Tag d;
  for (std::int64_t r = 0; r < count; ++r, rows += stride) {
    const Vec w = hn::Set(d, weight[r] * scale);
    for (std::int64_t c = 0; c < cols; c += kWidth)
      hn::Store(hn::Mul(hn::Load(d, rows + c), w), d, rows + c);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace everlong::lightning::cpu
HWY_AFTER_NAMESPACE();
#endif
