// Whole sequences on a GPU against the float64 reference, for the tests of this room's CUDA
// kernels. Only in builds with CUDA.
#pragma once
#include "mechanisms/lightning/kernel_cuda.h"
#include "mechanisms/lightning/lightning_cuda_test.h"
#include "mechanisms/lightning/reference.h"

namespace everlong::lightning {

struct Case {
  std::int64_t B = 2, T = 200, H = 3, K = 128, V = 128;
  std::vector<double> slope = {0.3, 0.02, 4e-8};
  bool states = true, exact = true, workspace = true;
  std::vector<std::int64_t> cu_seqlens = {};  // then B = 1
  DType dtype = DType::kBFloat16;
  std::int64_t gap = 8;  // after each head's row
  bool silu_q = false, silu_k = false, silu_v = false, row_squares = false;

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? B : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
  Shape shape() const {
    return {.batch = B,
            .tokens = T,
            .heads = H,
            .key_dim = K,
            .value_dim = V,
            .cu_seqlens = cu_seqlens};
  }
};
inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << info(c.dtype).name << " B " << c.B << " T " << c.T << " H " << c.H << " K " << c.K
             << " V " << c.V << (c.states ? " states" : "") << (c.exact ? " exact" : "")
             << (c.workspace ? " workspace" : "") << (c.cu_seqlens.empty() ? "" : " packed")
             << (c.silu_q ? " silu(q)" : "") << (c.silu_k ? " silu(k)" : "")
             << (c.silu_v ? " silu(v)" : "") << (c.row_squares ? " row squares" : "");
}

inline std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

// A tensor of [B, T, H, D], token by token head by head with a gap after each head.
class Tokens {
 public:
  Tokens(const Case& c, std::int64_t dim, unsigned seed)
      : dtype_(c.dtype),
        pitch_(size(dim + c.gap)),
        sizes_{c.B, c.T, c.H, dim},
        strides_{c.T * c.H * (dim + c.gap), c.H * (dim + c.gap), dim + c.gap, 1},
        values_(random_values(size(c.B * c.T * c.H * dim), c.dtype, seed)),
        memory_(size(c.B * c.T * c.H) * pitch_ * size_of(c.dtype)) {
    std::vector<double> spread(size(c.B * c.T * c.H) * pitch_,
                               std::numeric_limits<double>::quiet_NaN());
    for (std::size_t row = 0; row < size(c.B * c.T * c.H); ++row)
      std::copy_n(&values_[row * size(dim)], dim, &spread[row * pitch_]);
    write_values(memory_, dtype_, spread);
  }
  // Not written yet: NaN.
  Tokens(const Case& c, std::int64_t dim) : Tokens(c, dim, 0) {
    EXPECT_EQ(cudaMemset(memory_.data(), 0xff, size(strides_[0] * c.B) * size_of(dtype_)),
              cudaSuccess);
  }
  TensorView view() const { return {memory_.data(), dtype_, sizes_, strides_}; }
  const std::vector<double>& values() const { return values_; }
  // The values, once everything between the rows is still NaN.
  std::vector<double> read() const {
    const auto spread = read_values(memory_, dtype_);
    std::vector<double> out(values_.size());
    const std::size_t dim = size(sizes_[3]);
    for (std::size_t row = 0; row * dim < out.size(); ++row) {
      std::copy_n(&spread[row * pitch_], dim, &out[row * dim]);
      for (std::size_t i = dim; i < pitch_; ++i)
        EXPECT_TRUE(std::isnan(spread[row * pitch_ + i])) << "written behind row " << row;
    }
    return out;
  }

 private:
  DType dtype_;
  std::size_t pitch_;
  Sizes sizes_, strides_;
  std::vector<double> values_;
  Memory memory_;
};

class States {
 public:
  States(const Case& c, unsigned seed)
      : sizes_{c.sequences(), c.H, c.K, c.V},
        values_(random_values(size(c.sequences() * c.H * c.K * c.V), DType::kFloat32, seed)),
        memory_(values_.size() * 4) {
    if (seed != 0) write_values(memory_, DType::kFloat32, values_);
  }
  TensorView view() const {
    return {memory_.data(), DType::kFloat32, sizes_, dense_strides(sizes_)};
  }
  std::span<const double> values() const { return values_; }
  std::vector<double> read() const { return read_values(memory_, DType::kFloat32); }

 private:
  Sizes sizes_;
  std::vector<double> values_;
  Memory memory_;
};

// The offsets of a case on the device.
class Packing {
 public:
  explicit Packing(const Case& c) : cu_seqlens_(c.cu_seqlens), memory_(8 * c.cu_seqlens.size()) {
    std::vector<std::int32_t> offsets(2 * cu_seqlens_.size());
    cuda_offsets(cu_seqlens_, offsets);
    memory_.write(offsets.data());
  }
  CudaPacking view() const {
    if (cu_seqlens_.empty()) return {};
    return {cu_seqlens_, static_cast<const std::int32_t*>(memory_.data())};
  }

 private:
  std::span<const std::int64_t> cu_seqlens_;
  Memory memory_;
};

struct Tolerance {
  double outputs, states;
};

// What the products see of q, k or v.
inline std::vector<double> turned(const Tokens& x, bool silu, DType dtype) {
  std::vector<double> values = x.values();
  if (silu)
    for (double& value : values) value = rounded(dtype, value / (1 + std::exp(-value)));
  return values;
}

// Sums of squares of the rows of o [B, T, H, V], as [B, H, T].
inline std::vector<double> row_squares(const Case& c, std::span<const double> o) {
  std::vector<double> sums(size(c.B * c.H * c.T), 0.0);
  for (std::int64_t row = 0; row < c.B * c.T * c.H; ++row) {
    const std::int64_t head = row % c.H, token = row / c.H % c.T, batch = row / c.H / c.T;
    double& sum = sums[size((batch * c.H + head) * c.T + token)];
    for (std::int64_t i = 0; i < c.V; ++i) sum += o[size(row * c.V + i)] * o[size(row * c.V + i)];
  }
  return sums;
}

// Against the reference, twice, and the same bits the second time.
inline void expect_forward_right(const Case& c, Status (*forward)(const CudaForward&, void*),
                                 const Tolerance& tolerance) {
  SCOPED_TRACE(testing::Message() << c);
  const Tokens q(c, c.K, 1), k(c, c.K, 2), v(c, c.V, 3), o(c, c.V);
  const States in(c, 4), out(c, 0);
  const Packing packing(c);
  const Memory workspace(size(cuda_workspace_bytes(c.B, c.H, c.K, c.V)));
  const Memory squares(c.row_squares ? size(c.B * c.H * c.T) * 4 : 0);
  const auto turned_q = turned(q, c.silu_q, c.dtype), turned_k = turned(k, c.silu_k, c.dtype),
             turned_v = turned(v, c.silu_v, c.dtype);
  const auto wanted =
      reference::chunked({.shape = c.shape(),
                          .q_BTHK = turned_q,
                          .k_BTHK = turned_k,
                          .v_BTHV = turned_v,
                          .slope_H = c.slope,
                          .scale = 0.3,
                          .state_NHKV = c.states ? in.values() : std::span<const double>()},
                         48);
  ASSERT_TRUE(wanted.ok()) << wanted.status().message();
  CudaForward call{.q_BTHK = q.view(),
                   .k_BTHK = k.view(),
                   .v_BTHV = v.view(),
                   .o_BTHV = o.view(),
                   .slope_H = c.slope,
                   .scale = 0.3,
                   .exact = c.exact,
                   .workspace = c.workspace ? workspace.data() : nullptr,
                   .packing = packing.view(),
                   .fused = {c.silu_q, c.silu_k, c.silu_v,
                             c.row_squares ? static_cast<float*>(squares.data()) : nullptr}};
  if (c.states) call.state_in_NHKV = in.view(), call.state_out_NHKV = out.view();
  const Status status = forward(call, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto first = o.read();
  EXPECT_LT(relative_error(first, wanted->o_BTHV), tolerance.outputs);
  if (c.states) {
    EXPECT_LT(relative_error(out.read(), wanted->state_NHKV), tolerance.states);
  }
  if (c.row_squares) {
    EXPECT_LT(relative_error(read_values(squares, DType::kFloat32), row_squares(c, wanted->o_BTHV)),
              2 * tolerance.outputs);  // of squares
  }
  ASSERT_TRUE(forward(call, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(o.read(), first) << "another result for the same call";
}

inline void expect_backward_right(const Case& c, Status (*backward)(const CudaBackward&, void*),
                                  const Tolerance& tolerance) {
  SCOPED_TRACE(testing::Message() << c);
  const Tokens q(c, c.K, 1), k(c, c.K, 2), v(c, c.V, 3), grad_o(c, c.V, 5), grad_q(c, c.K),
      grad_k(c, c.K), grad_v(c, c.V);
  const States in(c, 4), grad_state(c, 6), grad_in(c, 0);
  const Packing packing(c);
  const Memory workspace(size(cuda_workspace_bytes(c.B, c.H, c.K, c.V)));
  const auto wanted = reference::chunked_gradient(
      {.shape = c.shape(),
       .q_BTHK = q.values(),
       .k_BTHK = k.values(),
       .v_BTHV = v.values(),
       .slope_H = c.slope,
       .scale = 0.3,
       .state_NHKV = c.states ? in.values() : std::span<const double>()},
      48, grad_o.values(), c.states ? grad_state.values() : std::span<const double>());
  ASSERT_TRUE(wanted.ok()) << wanted.status().message();
  CudaBackward call{.q_BTHK = q.view(),
                    .k_BTHK = k.view(),
                    .v_BTHV = v.view(),
                    .grad_o_BTHV = grad_o.view(),
                    .grad_q_BTHK = grad_q.view(),
                    .grad_k_BTHK = grad_k.view(),
                    .grad_v_BTHV = grad_v.view(),
                    .slope_H = c.slope,
                    .scale = 0.3,
                    .exact = c.exact,
                    .workspace = c.workspace ? workspace.data() : nullptr,
                    .packing = packing.view()};
  if (c.states) {
    call.state_in_NHKV = in.view();
    call.grad_state_NHKV = grad_state.view();
    call.grad_state_in_NHKV = grad_in.view();
  }
  const Status status = backward(call, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_LT(relative_error(grad_q.read(), wanted->q_BTHK), tolerance.outputs) << "dq";
  EXPECT_LT(relative_error(grad_k.read(), wanted->k_BTHK), tolerance.outputs) << "dk";
  EXPECT_LT(relative_error(grad_v.read(), wanted->v_BTHV), tolerance.outputs) << "dv";
  if (c.states) {
    EXPECT_LT(relative_error(grad_in.read(), wanted->state_NHKV), tolerance.states) << "dS";
  }
}

}  // namespace everlong::lightning
