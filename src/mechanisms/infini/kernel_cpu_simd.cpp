#include "mechanisms/infini/kernel_cpu_simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mechanisms/infini/kernel_cpu_simd.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per target
// After foreach_target.h:
#include <algorithm>
#include <type_traits>

#include "mechanisms/infini/kernel_cpu_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace everlong::infini::HWY_NAMESPACE {
namespace {

// Matrices of a thread, each kRow floats a row.
struct Scratch {
  float* next;
  explicit Scratch(std::byte* memory) : next(reinterpret_cast<float*>(memory)) {}
  float* rows(std::int64_t count) {
    float* mine = next;
    next += count * kRow;
    return mine;
  }
};

// What the read of one segment and key head knows.
struct Reading {
  std::int64_t K, V_, H, G, group;
  const float *M, *z, *gate;
  bool empty;

  Reading(const ReadCall& call, std::int64_t p, std::int64_t g)
      : K(call.q.sizes[3]),
        V_(call.local.sizes[3]),
        H(call.q.sizes[2]),
        G(call.M.sizes[1]),
        group(H / G),
        M(static_cast<const float*>(call.M.data) + (p * G + g) * K * V_),
        z(static_cast<const float*>(call.z.data) + (p * G + g) * K),
        gate(static_cast<const float*>(call.gate.data) + g * group * V_),
        empty(all_zero(z, K)) {}
  const float* gate_of(std::int64_t row) const { return gate + row % group * V_; }
};

// Row r of features [kRow], already copied: sigma(q) / (sigma(q).z), and times z in `weights`.
// Without a divisor both are zero.
void normalise(const float* z_padded, std::int64_t wide, float* features, float* weights) {
  const F d;
  V sum = hn::Zero(d);
  for (std::int64_t c = 0; c < wide; c += lanes_of()) {
    const V phi = sigma(d, hn::LoadU(d, features + c)),
            mass = hn::Mul(phi, hn::LoadU(d, z_padded + c));
    hn::StoreU(phi, d, features + c);
    hn::StoreU(mass, d, weights + c);
    sum = hn::Add(sum, mass);
  }
  const float den = hn::GetLane(hn::SumOfLanes(d, sum));
  const V share = hn::Set(d, std::abs(den) < kNothing ? 0.0F : 1.0F / den);
  for (std::int64_t c = 0; c < wide; c += lanes_of()) {
    hn::StoreU(hn::Mul(share, hn::LoadU(d, features + c)), d, features + c);
    hn::StoreU(hn::Mul(share, hn::LoadU(d, weights + c)), d, weights + c);
  }
}

void pad_vector(const float* from, std::int64_t count, float* to) {
  for (std::int64_t c = 0; c < padded(count); ++c) to[c] = c < count ? from[c] : 0.0F;
}

void blend(const float* g, const float* mem, std::int64_t count, bool bypass, float* local) {
  if (bypass) return;
  const F d;
  std::int64_t c = 0;
  for (; c + lanes_of() <= count; c += lanes_of()) {
    const V gate = hn::LoadU(d, g + c), own = hn::LoadU(d, local + c);
    hn::StoreU(hn::MulAdd(gate, hn::Sub(hn::LoadU(d, mem + c), own), own), d, local + c);
  }
  for (; c < count; ++c) local[c] += g[c] * (mem[c] - local[c]);
}

// The gradients of a row's blend: dgate += up (mem - local), local becomes (1 - g) up, up g up.
void blend_backward(const float* g, const float* mem, std::int64_t count, float* dgate,
                    float* local, float* up) {
  const F d;
  std::int64_t c = 0;
  for (; c + lanes_of() <= count; c += lanes_of()) {
    const V of = hn::LoadU(d, up + c), away = hn::Mul(hn::LoadU(d, g + c), of),
            apart = hn::Sub(hn::LoadU(d, mem + c), hn::LoadU(d, local + c));
    hn::StoreU(hn::MulAdd(of, apart, hn::LoadU(d, dgate + c)), d, dgate + c);
    hn::StoreU(hn::Sub(of, away), d, local + c);
    hn::StoreU(away, d, up + c);
  }
  for (; c < count; ++c) {
    dgate[c] += up[c] * (mem[c] - local[c]);
    const float away = g[c] * up[c];
    local[c] = up[c] - away;
    up[c] = away;
  }
}

void read_one(const ReadCall& call, const TensorView& out, std::int64_t p, std::int64_t g,
              std::int64_t first, std::int64_t last, std::byte* memory) {
  const Reading m(call, p, g);
  Scratch scratch(memory);
  float *means = scratch.rows(kMostRows), *z = scratch.rows(1), *phi = scratch.rows(kTile),
        *weights = scratch.rows(kTile), *mem = scratch.rows(kTile), *local = scratch.rows(kTile);
  const Rows q_rows = group_rows(call.q, p, g, m.group),
             local_rows = group_rows(call.local, p, g, m.group);
  const MutableRows out_rows = group_rows(out, p, g, m.group);
  pad_vector(m.z, m.K, z);
  if (!m.empty) copy_matrix(m.M, m.K, m.V_, m.z, means);
  for (std::int64_t from = first; from < last; from += kTile) {
    const std::int64_t rows = std::min(kTile, last - from);
    copy_rows(local_rows, from, rows, m.V_, local);
    if (!m.empty) {
      copy_rows(q_rows, from, rows, m.K, phi);
      for (std::int64_t r = 0; r < rows; ++r)
        normalise(z, padded(m.K), phi + r * kRow, weights + r * kRow);
      multiply_rows(weights, means, rows, m.K, m.V_, mem);
    } else {
      std::memset(mem, 0, static_cast<std::size_t>(rows * kRow) * sizeof(float));
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      blend(m.gate_of(from + r), mem + r * kRow, m.V_, m.empty && call.bypass, local + r * kRow);
      store_row(out_rows, from + r, m.V_, local + r * kRow, 1.0F);
    }
  }
}

// X += phi'^T dA, Y -= <dA, mem> phi', dq = p (dA M~^T - <dA, mem>) sigma'/sigma, with phi' =
// sigma(q) / den, p = phi' z, dA = g dO.
void read_backward_one(const ReadCall& call, const ReadGrads& grads, std::int64_t p, std::int64_t g,
                       std::byte* memory) {
  const Reading m(call, p, g);
  const F d;
  Scratch scratch(memory);
  float *means = scratch.rows(kMostRows), *means_t = scratch.rows(kMostRows),
        *X = scratch.rows(kMostRows), *z = scratch.rows(1), *Y = scratch.rows(1),
        *raw = scratch.rows(kTile), *phi = scratch.rows(kTile), *weights = scratch.rows(kTile),
        *mem = scratch.rows(kTile), *local = scratch.rows(kTile), *go = scratch.rows(kTile),
        *slope = scratch.rows(kTile);
  const Rows q_rows = group_rows(call.q, p, g, m.group),
             local_rows = group_rows(call.local, p, g, m.group),
             go_rows = group_rows(grads.out, p, g, m.group);
  const MutableRows dq_rows = group_rows(grads.q, p, g, m.group),
                    dlocal_rows = group_rows(grads.local, p, g, m.group);
  float* dgate = static_cast<float*>(grads.gate.data) + (p * m.H + g * m.group) * m.V_;
  std::fill_n(dgate, m.group * m.V_, 0.0F);
  std::memset(X, 0, static_cast<std::size_t>(kMostRows * kRow) * sizeof(float));
  std::memset(Y, 0, kRow * sizeof(float));
  pad_vector(m.z, m.K, z);
  if (!m.empty) {
    copy_matrix(m.M, m.K, m.V_, m.z, means);
    transpose_matrix(m.M, m.K, m.V_, m.z, means_t);
  }
  const std::int64_t all = call.q.sizes[1] * m.group, wide = padded(m.K);
  const bool bypass = m.empty && call.bypass;
  for (std::int64_t from = 0; from < all; from += kTile) {
    const std::int64_t rows = std::min(kTile, all - from);
    copy_rows(local_rows, from, rows, m.V_, local);
    copy_rows(go_rows, from, rows, m.V_, go);
    if (m.empty) {
      std::memset(mem, 0, static_cast<std::size_t>(rows * kRow) * sizeof(float));
    } else {
      copy_rows(q_rows, from, rows, m.K, raw);
      copy_rows(q_rows, from, rows, m.K, phi);
      for (std::int64_t r = 0; r < rows; ++r)
        normalise(z, wide, phi + r * kRow, weights + r * kRow);
      multiply_rows(weights, means, rows, m.K, m.V_, mem);
    }
    for (std::int64_t r = 0; r < rows; ++r) {  // go becomes dA, local its gradient
      const float* gate = m.gate_of(from + r);
      float *a = mem + r * kRow, *o = local + r * kRow, *up = go + r * kRow,
            *to = dgate + (from + r) % m.group * m.V_;
      if (bypass) {
        std::copy_n(up, m.V_, o);
        for (std::int64_t c = 0; c < m.V_; ++c) up[c] *= gate[c];
      } else {
        blend_backward(gate, a, m.V_, to, o, up);
      }
      store_row(dlocal_rows, from + r, m.V_, o, 1.0F);
    }
    if (m.empty) {
      std::memset(slope, 0, kRow * sizeof(float));
      for (std::int64_t r = 0; r < rows; ++r) store_row(dq_rows, from + r, m.K, slope, 1.0F);
      continue;
    }
    multiply_rows(go, means_t, rows, m.V_, m.K, slope);
    add_outer(phi, go, rows, m.K, m.V_, X);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float along = dot_rows(go + r * kRow, mem + r * kRow, padded(m.V_));
      float* to = slope + r * kRow;
      const V minus = hn::Set(d, -along), zero = hn::Zero(d), one = hn::Set(d, 1.0F);
      for (std::int64_t c = 0; c < wide; c += lanes_of()) {
        const V x = hn::LoadU(d, raw + r * kRow + c);
        const V kappa = hn::IfThenElse(hn::Gt(x, zero), hn::Div(one, hn::Add(one, x)), one);
        const V value =
            hn::Mul(hn::LoadU(d, weights + r * kRow + c), hn::Add(hn::LoadU(d, to + c), minus));
        hn::StoreU(hn::Mul(value, kappa), d, to + c);
        hn::StoreU(hn::MulAdd(minus, hn::LoadU(d, phi + r * kRow + c), hn::LoadU(d, Y + c)), d,
                   Y + c);
      }
      store_row(dq_rows, from + r, m.K, to, 1.0F);
    }
  }
  float *dM = static_cast<float*>(grads.M.data) + (p * m.G + g) * m.K * m.V_,
        *dz = static_cast<float*>(grads.z.data) + (p * m.G + g) * m.K;
  for (std::int64_t i = 0; i < m.K; ++i) std::copy_n(X + i * kRow, m.V_, dM + i * m.V_);
  std::copy_n(Y, m.K, dz);
}

// Tokens [from, from + rows) of segment p: features times weights, and values; rows of weight 0
// become zero.
void load_written(const WriteCall& call, std::int64_t p, std::int64_t g, std::int64_t from,
                  std::int64_t rows, float* raw, float* phi, float* v, float* w) {
  const std::int64_t K = call.k.sizes[3], V_ = call.v.sizes[3], C = call.k.sizes[1];
  const F d;
  copy_rows(group_rows(call.k, p, g, 1), from, rows, K, raw);
  copy_rows(group_rows(call.v, p, g, 1), from, rows, V_, v);
  const auto* weight = static_cast<const float*>(call.weight.data);
  for (std::int64_t r = 0; r < rows; ++r) {
    w[r] = weight == nullptr ? 1.0F : weight[p * C + from + r];
    if (w[r] == 0) {
      std::memset(phi + r * kRow, 0, kRow * sizeof(float));
      std::memset(v + r * kRow, 0, kRow * sizeof(float));
      continue;
    }
    for (std::int64_t c = 0; c < padded(K); c += lanes_of())
      hn::StoreU(hn::Mul(hn::Set(d, w[r]), sigma(d, hn::LoadU(d, raw + r * kRow + c))), d,
                 phi + r * kRow + c);
  }
  for (std::int64_t r = rows; r < row_blocks(rows) * kRowBlock; ++r)
    std::memset(phi + r * kRow, 0, kRow * sizeof(float));
}

void write_one(const WriteCall& call, const TensorView& M, const TensorView& z, std::int64_t p,
               std::int64_t g, std::byte* memory) {
  const F d;
  Scratch scratch(memory);
  float *X = scratch.rows(kMostRows), *sum = scratch.rows(1), *w = scratch.rows(1),
        *raw = scratch.rows(kTile), *phi = scratch.rows(kTile), *v = scratch.rows(kTile);
  const std::int64_t K = call.k.sizes[3], V_ = call.v.sizes[3], C = call.k.sizes[1],
                     G = call.k.sizes[2];
  std::memset(X, 0, static_cast<std::size_t>(kMostRows * kRow) * sizeof(float));
  std::memset(sum, 0, kRow * sizeof(float));
  for (std::int64_t from = 0; from < C; from += kTile) {
    const std::int64_t rows = std::min(kTile, C - from);
    load_written(call, p, g, from, rows, raw, phi, v, w);
    add_outer(phi, v, rows, K, V_, X);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < padded(K); c += lanes_of())
        hn::StoreU(hn::Add(hn::LoadU(d, sum + c), hn::LoadU(d, phi + r * kRow + c)), d, sum + c);
  }
  float* to = static_cast<float*>(M.data) + (p * G + g) * K * V_;
  for (std::int64_t i = 0; i < K; ++i) std::copy_n(X + i * kRow, V_, to + i * V_);
  std::copy_n(sum, K, static_cast<float*>(z.data) + (p * G + g) * K);
}

// dv = w sigma(k) G, dk = w (v G^T + h) sigma'(k).
void write_backward_one(const WriteCall& call, const WriteGrads& grads, std::int64_t p,
                        std::int64_t g, std::byte* memory) {
  const F d;
  Scratch scratch(memory);
  float *by_row = scratch.rows(kMostRows), *by_column = scratch.rows(kMostRows),
        *h = scratch.rows(1), *w = scratch.rows(1), *raw = scratch.rows(kTile),
        *phi = scratch.rows(kTile), *v = scratch.rows(kTile), *dv = scratch.rows(kTile),
        *dk = scratch.rows(kTile);
  const std::int64_t K = call.k.sizes[3], V_ = call.v.sizes[3], C = call.k.sizes[1],
                     G = call.k.sizes[2];
  const float* from_M = static_cast<const float*>(grads.M.data) + (p * G + g) * K * V_;
  copy_matrix(from_M, K, V_, nullptr, by_row);
  transpose_matrix(from_M, K, V_, nullptr, by_column);
  pad_vector(static_cast<const float*>(grads.z.data) + (p * G + g) * K, K, h);
  const MutableRows dk_rows = group_rows(grads.k, p, g, 1), dv_rows = group_rows(grads.v, p, g, 1);
  for (std::int64_t from = 0; from < C; from += kTile) {
    const std::int64_t rows = std::min(kTile, C - from);
    load_written(call, p, g, from, rows, raw, phi, v, w);
    multiply_rows(phi, by_row, rows, K, V_, dv);
    multiply_rows(v, by_column, rows, V_, K, dk);
    for (std::int64_t r = 0; r < rows; ++r) {
      store_row(dv_rows, from + r, V_, dv + r * kRow, 1.0F);
      float* to = dk + r * kRow;
      for (std::int64_t c = 0; c < padded(K); c += lanes_of()) {
        const V x = hn::LoadU(d, raw + r * kRow + c);
        const V slope = w[r] == 0 ? hn::Zero(d) : hn::Mul(hn::Set(d, w[r]), sigma_slope(d, x));
        hn::StoreU(hn::Mul(slope, hn::Add(hn::LoadU(d, to + c), hn::LoadU(d, h + c))), d, to + c);
      }
      store_row(dk_rows, from + r, K, to, 1.0F);
    }
  }
}

}  // namespace
}  // namespace everlong::infini::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace everlong::infini {

HWY_EXPORT(read_one);
HWY_EXPORT(read_backward_one);
HWY_EXPORT(write_one);
HWY_EXPORT(write_backward_one);

namespace {

constexpr std::int64_t kRowBytes = 272 * 4, kPanel = cpu::kMostDim + 12, kTileHeight = 96;

}  // namespace

// Three panels, seven tiles and two vectors at most.
std::int64_t read_scratch_bytes(std::int64_t, std::int64_t) {
  return (3 * kPanel + 7 * kTileHeight + 2) * kRowBytes;
}
std::int64_t write_scratch_bytes(std::int64_t, std::int64_t) {
  return (2 * kPanel + 5 * kTileHeight + 2) * kRowBytes;
}

void read_unit(const ReadCall& call, const TensorView& out, std::int64_t p, std::int64_t g,
               std::int64_t first, std::int64_t last, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(read_one)(call, out, p, g, first, last, scratch);
}
void read_backward_unit(const ReadCall& call, const ReadGrads& grads, std::int64_t p,
                        std::int64_t g, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(read_backward_one)(call, grads, p, g, scratch);
}
void write_unit(const WriteCall& call, const TensorView& M, const TensorView& z, std::int64_t p,
                std::int64_t g, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(write_one)(call, M, z, p, g, scratch);
}
void write_backward_unit(const WriteCall& call, const WriteGrads& grads, std::int64_t p,
                         std::int64_t g, std::byte* scratch) {
  HWY_DYNAMIC_DISPATCH(write_backward_one)(call, grads, p, g, scratch);
}

}  // namespace everlong::infini
#endif
