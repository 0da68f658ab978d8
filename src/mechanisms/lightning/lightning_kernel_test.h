// Problems for the tests of the CPU kernel: tensors between NaN, threads, what the kernel makes of
// them.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mechanisms/lightning/kernel.h"
#include "mechanisms/lightning/reference.h"
#include "support/tolerance.h"

namespace everlong::lightning::test {

using Values = std::vector<double>;
using Offsets = std::vector<std::int64_t>;

// Errors are measured in shares of the largest value. fp32: sums of some hundred terms of size 1,
// and a handful of roundings of S; an off-by-one decay or a lost tail shows at 1e-2 or more.
inline constexpr double kFloat32 = tolerance::floor_of(DType::kFloat32);
// bf16: one rounding of each output to 8 bits; everything before it is fp32.
inline constexpr double kBFloat16Rounding = 1.0 / 256;

class Threads final : public Executor {
 public:
  explicit Threads(int count) : count_(count) {}
  int threads() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    std::vector<std::thread> pool;
    for (int t = 0; t < count_; ++t)
      pool.emplace_back([&, t] {
        for (std::int64_t i = t; i < tasks; i += count_) task(i, t);
      });
    for (auto& thread : pool) thread.join();
  }

 private:
  int count_;
};

inline std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline double from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// A tensor in its dtype inside a larger block of NaN: what lies between its rows is not its own.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::array<std::int64_t, 4> sizes, std::int64_t gap, bool heads_first = false)
      : dtype_(dtype), sizes_(sizes) {
    strides_[3] = 1;
    strides_[2] = sizes[3] + gap;
    strides_[1] = sizes[2] * strides_[2] + gap;
    if (heads_first) {
      strides_[1] = sizes[3] + gap;
      strides_[2] = sizes[1] * strides_[1] + gap;
    }
    strides_[0] = sizes[1] * sizes[2] * (sizes[3] + gap) + (sizes[1] + sizes[2]) * gap;
    words_.assign(static_cast<std::size_t>(sizes[0] * strides_[0] + gap + 1) * info(dtype).bytes,
                  static_cast<char>(0xFF));  // NaN in every float type
  }
  TensorView view() { return {words_.data(), dtype_, sizes_, strides_}; }
  std::size_t numel() const {
    return static_cast<std::size_t>(sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]);
  }
  // Rounds each value to the dtype.
  void set(Values& values) {
    for_each([&](std::size_t i, std::size_t at) {
      if (dtype_ == DType::kFloat32) {
        const auto x = static_cast<float>(values[i]);
        std::memcpy(words_.data() + at * 4, &x, 4);
        values[i] = x;
      } else {
        const std::uint16_t x = to_bf16(static_cast<float>(values[i]));
        std::memcpy(words_.data() + at * 2, &x, 2);
        values[i] = from_bf16(x);
      }
    });
  }
  Values get() const {
    Values out(numel());
    for_each([&](std::size_t i, std::size_t at) {
      float x = 0;
      std::uint16_t half = 0;
      if (dtype_ == DType::kFloat32)
        std::memcpy(&x, words_.data() + at * 4, 4);
      else
        std::memcpy(&half, words_.data() + at * 2, 2);
      out[i] = dtype_ == DType::kFloat32 ? static_cast<double>(x) : from_bf16(half);
    });
    return out;
  }
  const std::vector<char>& bytes() const { return words_; }
  // What lies between rows is still NaN.
  bool gaps_untouched() const {
    std::vector<char> copy = words_;
    const std::size_t size = info(dtype_).bytes;
    for_each([&](std::size_t, std::size_t at) {
      std::fill_n(copy.begin() + static_cast<std::ptrdiff_t>(at * size), size,
                  static_cast<char>(0xFF));
    });
    return std::ranges::all_of(copy, [](char c) { return c == static_cast<char>(0xFF); });
  }

 private:
  template <class Visit>
  void for_each(const Visit& visit) const {
    std::size_t i = 0;
    for (std::int64_t a = 0; a < sizes_[0]; ++a)
      for (std::int64_t b = 0; b < sizes_[1]; ++b)
        for (std::int64_t c = 0; c < sizes_[2]; ++c)
          for (std::int64_t d = 0; d < sizes_[3]; ++d)
            visit(i++, static_cast<std::size_t>(a * strides_[0] + b * strides_[1] +
                                                c * strides_[2] + d));
  }
  DType dtype_ = DType::kFloat32;
  std::array<std::int64_t, 4> sizes_{}, strides_{};
  std::vector<char> words_;
};

struct Wanted {
  std::int64_t batch = 1, tokens = 65, key_dim = 16, value_dim = 24;
  Values slope = {0.84, 0.2, 0.02, 1e-5};
  Offsets offsets = {};
  bool state = true;
  DType dtype = DType::kFloat32;
  bool heads_first = false;
  double scale = 0.7;
};

// A problem, what the reference makes of it, and what the kernel does.
struct Case {
  Wanted w;
  Shape shape;
  Values q, k, v, state, grad_o, grad_state;
  Tensor tq, tk, tv, tstate, tgrad_o, tgrad_state;

  explicit Case(const Wanted& wanted, unsigned seed = 1) : w(wanted) {
    const auto H = static_cast<std::int64_t>(w.slope.size());
    shape = {.batch = w.batch,
             .tokens = w.offsets.empty() ? w.tokens : w.offsets.back(),
             .heads = H,
             .key_dim = w.key_dim,
             .value_dim = w.value_dim,
             .cu_seqlens = w.offsets};
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](const Tensor& like) {
      Values out(like.numel());
      for (double& x : out) x = normal(generator);
      return out;
    };
    tq = keys(), tk = keys(), tv = values(), tgrad_o = values();
    tstate = states(), tgrad_state = states();
    for (auto [tensor, numbers] : {std::pair{&tq, &q},
                                   {&tk, &k},
                                   {&tv, &v},
                                   {&tgrad_o, &grad_o},
                                   {&tstate, &state},
                                   {&tgrad_state, &grad_state}}) {
      *numbers = draw(*tensor);
      tensor->set(*numbers);
    }
    if (!w.state) state.clear();
  }
  Case(const Case&) = delete;

  Tensor keys() const {
    return {w.dtype, {shape.batch, shape.tokens, shape.heads, w.key_dim}, 3, w.heads_first};
  }
  Tensor values() const {
    return {w.dtype, {shape.batch, shape.tokens, shape.heads, w.value_dim}, 5, w.heads_first};
  }
  Tensor states() const {
    return {DType::kFloat32, {shape.sequences(), shape.heads, w.key_dim, w.value_dim}, 1};
  }
  reference::Input input() const {
    return {.shape = shape,
            .q_BTHK = q,
            .k_BTHK = k,
            .v_BTHV = v,
            .slope_H = w.slope,
            .scale = w.scale,
            .state_NHKV = state};
  }
  cpu::ForwardArgs args(Tensor& o, Tensor* state_out) {
    return {.q_BTHK = tq.view(),
            .k_BTHK = tk.view(),
            .v_BTHV = tv.view(),
            .o_BTHV = o.view(),
            .state_NHKV = w.state ? ConstTensorView(tstate.view()) : ConstTensorView(),
            .state_out_NHKV = state_out == nullptr ? TensorView() : state_out->view(),
            .cu_seqlens = w.offsets,
            .slope = w.slope,
            .scale = w.scale};
  }
};

inline std::vector<std::byte> poisoned_workspace(const Case& c, int threads) {
  return std::vector<std::byte>(
      cpu::workspace_bytes(c.shape.heads, c.w.key_dim, c.w.value_dim, threads), std::byte{0xFF});
}

struct Results {
  Tensor o, state, grad_q, grad_k, grad_v, grad_state;
};

inline Results run(Case& c, const Executor& executor) {
  Results r{c.values(), c.states(), c.keys(), c.keys(), c.values(), c.states()};
  auto workspace = poisoned_workspace(c, executor.threads());
  const Status forward = cpu::forward(c.args(r.o, &r.state), workspace, executor);
  EXPECT_TRUE(forward.ok()) << forward.message();
  std::ranges::fill(workspace, std::byte{0xFF});
  const Status backward = cpu::backward({.q_BTHK = c.tq.view(),
                                         .k_BTHK = c.tk.view(),
                                         .v_BTHV = c.tv.view(),
                                         .state_NHKV = c.args(r.o, nullptr).state_NHKV,
                                         .grad_o_BTHV = c.tgrad_o.view(),
                                         .grad_state_NHKV = c.tgrad_state.view(),
                                         .grad_q_BTHK = r.grad_q.view(),
                                         .grad_k_BTHK = r.grad_k.view(),
                                         .grad_v_BTHV = r.grad_v.view(),
                                         .grad_state_in_NHKV = r.grad_state.view(),
                                         .cu_seqlens = c.w.offsets,
                                         .slope = c.w.slope,
                                         .scale = c.w.scale},
                                        workspace, executor);
  EXPECT_TRUE(backward.ok()) << backward.message();
  return r;
}

// max |a - b| over max(|b|, 1); infinite for NaN.
inline double error(const Values& actual, const Values& expected) {
  double worst = 0, size = 1;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    size = std::max(size, std::abs(expected[i]));
    const double off = std::abs(actual[i] - expected[i]);
    worst = std::isfinite(off) ? std::max(worst, off) : std::numeric_limits<double>::infinity();
  }
  return worst / size;
}

}  // namespace everlong::lightning::test
