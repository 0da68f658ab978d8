// What tests of the softmax block need: cases, strided arrays, the definition in double.
#pragma once
#include <gtest/gtest.h>
#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cpu/every_target_test.h"
#include "kernels/cpu/softmax_block.h"

namespace everlong::cpu {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Numbers = std::vector<double>;
using Random = std::mt19937;

// [rows, dim] in memory: rows in groups, with gaps everywhere that must not be read or written.
struct Store {
  std::int64_t rows, dim, group, inner, outer;
  DType dtype;
  std::vector<float> wide;
  std::vector<std::uint16_t> low;

  Store(std::int64_t r, std::int64_t d, DType type, std::int64_t g = 1)
      : rows(r), dim(d), group(g), inner(d + 3), outer(g * (d + 3) + 5), dtype(type) {
    const auto size = static_cast<std::size_t>((r / g + 1) * outer);
    wide.assign(size, static_cast<float>(kNan));
    low.assign(size, 0x7fc1);
  }
  std::size_t at(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(r / group * outer + r % group * inner + c);
  }
  MutableRows view() {
    void* data = dtype == DType::kBFloat16 ? static_cast<void*>(low.data()) : wide.data();
    return {data, dtype, outer, inner, group};
  }
  double get(std::int64_t r, std::int64_t c) const {
    if (dtype != DType::kBFloat16) return wide[at(r, c)];
    const std::uint32_t bits = static_cast<std::uint32_t>(low[at(r, c)]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  void set(std::int64_t r, std::int64_t c, double value) {
    const float x = static_cast<float>(value);
    wide[at(r, c)] = x;
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    low[at(r, c)] = static_cast<std::uint16_t>(bits >> 16);
  }
  Store& fill(Random& random) {
    std::normal_distribution<double> normal;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < dim; ++c) set(r, c, normal(random));
    return *this;
  }
};

struct Case {
  std::int64_t rows, keys;
  int key_dim, value_dim;
  DType dtype = DType::kFloat32;
  std::int64_t group = 1;
  double scale = 0.3;
  std::vector<std::int64_t> begin = {}, end = {};
  std::vector<float> bias = {};
};

struct Values {
  Numbers o, lse, dq, dk, dv;
};

// A case with its inputs, the definition in double, and the block.
struct Trial {
  const Case& c;
  Store q, k, v, go;

  Trial(const Case& given, Random& random)
      : c(given),
        q(c.rows, c.key_dim, c.dtype, c.group),
        k(c.keys, c.key_dim, c.dtype),
        v(c.keys, c.value_dim, c.dtype),
        go(c.rows, c.value_dim, c.dtype, c.group) {
    for (Store* x : {&q, &k, &v, &go}) x->fill(random);
  }

  bool sees(std::int64_t r, std::int64_t j) const {
    return j >= c.begin[static_cast<std::size_t>(r)] && j < c.end[static_cast<std::size_t>(r)] &&
           (c.bias.empty() || c.bias[static_cast<std::size_t>(j)] > -kInfinity);
  }

  Values definition() const {
    const auto row = [](auto& list, std::int64_t r, std::int64_t dim) {
      return list.data() + r * dim;
    };
    const Numbers Q = numbers(q), K = numbers(k), V = numbers(v), G = numbers(go);
    const std::int64_t dv = c.value_dim, dk = c.key_dim;
    Values out{Numbers(G.size()), Numbers(static_cast<std::size_t>(c.rows), -kInfinity),
               Numbers(Q.size()), Numbers(K.size()), Numbers(V.size())};
    const auto dot = [](const double* a, const double* b, std::int64_t n) {
      double sum = 0;
      for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
      return sum;
    };
    const auto add = [](double factor, const double* from, double* to, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
    };
    for (std::int64_t r = 0; r < c.rows; ++r) {
      Numbers score(static_cast<std::size_t>(c.keys), -kInfinity);
      const double *query = row(Q, r, dk), *grad = row(G, r, dv);
      for (std::int64_t j = 0; j < c.keys; ++j)
        if (sees(r, j))
          *row(score, j, 1) = (c.bias.empty() ? 0.0F : *row(c.bias, j, 1)) +
                              c.scale * dot(query, row(K, j, dk), dk);
      const double top = *std::ranges::max_element(score);
      if (top == -kInfinity) continue;
      double sum = 0, delta = 0;
      for (const double s : score) sum += std::exp(s - top);
      const double lse = *row(out.lse, r, 1) = top + std::log(sum);
      for (std::int64_t j = 0; j < c.keys; ++j) {
        if (!sees(r, j)) continue;
        const double p = std::exp(*row(score, j, 1) - lse);
        add(p, row(V, j, dv), row(out.o, r, dv), dv);
        add(p, grad, row(out.dv, j, dv), dv);
        delta += p * dot(grad, row(V, j, dv), dv);
      }
      for (std::int64_t j = 0; j < c.keys; ++j) {
        if (!sees(r, j)) continue;
        const double ds =
            c.scale * std::exp(*row(score, j, 1) - lse) * (dot(grad, row(V, j, dv), dv) - delta);
        add(ds, row(K, j, dk), row(out.dq, r, dk), dk);
        add(ds, query, row(out.dk, j, dk), dk);
      }
    }
    return out;
  }

  SoftmaxShape shape() const { return {c.key_dim, c.value_dim, static_cast<float>(c.scale)}; }
  KeyRun keys(std::int64_t first, std::int64_t count) {
    Rows k_rows = k.view(), v_rows = v.view();
    const std::int64_t bytes = c.dtype == DType::kBFloat16 ? 2 : 4;
    k_rows.data = static_cast<const char*>(k_rows.data) + bytes * first * k.outer;
    v_rows.data = static_cast<const char*>(v_rows.data) + bytes * first * v.outer;
    return {k_rows, v_rows, count, c.bias.empty() ? nullptr : c.bias.data() + first};
  }
  // Intervals in keys from `first` on.
  std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> sight(std::int64_t first) const {
    auto begin = c.begin, end = c.end;
    for (auto* list : {&begin, &end})
      for (auto& x : *list) x -= first;
    return {begin, end};
  }

  template <class Block>
  static hwy::AlignedFreeUniquePtr<float[]> scratch(const Case& given) {
    const auto floats =
        static_cast<std::size_t>(Block::scratch_bytes(given.key_dim, given.value_dim) / 4);
    auto memory = hwy::AllocateAligned<float>(floats);
    std::fill_n(memory.get(), floats, static_cast<float>(kNan));
    return memory;
  }

  // The keys [from, to) in one or two calls.
  void forward(Store& o, Store& lse, std::int64_t from, std::int64_t middle, std::int64_t to) {
    auto memory = scratch<SoftmaxForward>(c);
    SoftmaxForward block(shape(), memory.get());
    block.begin(q.view(), static_cast<int>(c.rows));
    for (const auto& [a, b] : {std::pair(from, middle), std::pair(middle, to)}) {
      const auto [begin, end] = sight(a);
      block.absorb(keys(a, b - a), {begin.data(), end.data()});
    }
    block.finish(o.view(), lse.view());
  }

  Values block() {
    Store o(c.rows, c.value_dim, c.dtype, c.group), lse(c.rows, 1, DType::kFloat32, c.group),
        delta(c.rows, 1, DType::kFloat32, c.group), dq(c.rows, c.key_dim, c.dtype, c.group),
        dk(c.keys, c.key_dim, c.dtype), dv(c.keys, c.value_dim, c.dtype);
    forward(o, lse, 0, c.keys, c.keys);
    softmax_delta(o.view(), go.view(), static_cast<int>(c.rows), c.value_dim, delta.view());
    auto memory = scratch<SoftmaxBackward>(c);
    SoftmaxBackward backward(shape(), memory.get());
    const auto floats = static_cast<std::size_t>(kTileRows * backward.grad_q_stride());
    auto sum = hwy::AllocateAligned<float>(floats);
    std::fill_n(sum.get(), floats, 0.0F);
    for (std::int64_t j = 0; j < c.keys; j += kTileKeys) {
      const std::int64_t count = std::min<std::int64_t>(kTileKeys, c.keys - j);
      const auto [begin, end] = sight(j);
      backward.begin(keys(j, count));
      backward.absorb({q.view(), go.view(), lse.view(), delta.view(), static_cast<int>(c.rows)},
                      {begin.data(), end.data()}, sum.get());
      MutableRows dk_rows = dk.view(), dv_rows = dv.view();
      const std::int64_t bytes = c.dtype == DType::kBFloat16 ? 2 : 4;
      dk_rows.data = static_cast<char*>(dk_rows.data) + bytes * j * dk.outer;
      dv_rows.data = static_cast<char*>(dv_rows.data) + bytes * j * dv.outer;
      backward.finish(dk_rows, dv_rows);
    }
    softmax_write_grad_q(sum.get(), shape(), static_cast<int>(c.rows), dq.view());
    return {numbers(o), numbers(lse), numbers(dq), numbers(dk), numbers(dv)};
  }

  static Numbers numbers(const Store& x) {
    Numbers list;
    for (std::int64_t r = 0; r < x.rows; ++r)
      for (std::int64_t c = 0; c < x.dim; ++c) list.push_back(x.get(r, c));
    return list;
  }
};

}  // namespace everlong::cpu
