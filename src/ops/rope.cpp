#include "ops/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/cpu/rope_turn.h"

namespace everlong {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// First and second coordinates of every pair, as views [.., F].
std::pair<at::Tensor, at::Tensor> split_pairs(const at::Tensor& x, std::int64_t count,
                                              bool interleaved) {
  const at::Tensor turned = x.narrow(-1, 0, 2 * count);
  if (!interleaved) return {turned.narrow(-1, 0, count), turned.narrow(-1, count, count)};
  const at::Tensor pairs = turned.unflatten(-1, {count, 2});
  return {pairs.select(-1, 0), pairs.select(-1, 1)};
}

// (a, b) -> (a cos - sign b sin, b cos + sign a sin).
at::Tensor rotate(const at::Tensor& x_in, const at::Tensor& cos, const at::Tensor& sin,
                  bool interleaved, double sign) {
  const std::int64_t count = cos.size(-1), rest = x_in.size(-1) - 2 * count;
  const at::Tensor x = x_in.to(cos.scalar_type());
  at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  const auto [a, b] = split_pairs(x, count, interleaved);
  auto [to_a, to_b] = split_pairs(out, count, interleaved);
  const at::Tensor c = cos.unsqueeze(-2), s = sin.unsqueeze(-2);  // the same for every head
  at::mul_out(to_a, a, c).addcmul_(b, s, -sign);
  at::mul_out(to_b, b, c).addcmul_(a, s, sign);
  if (rest > 0) out.narrow(-1, 2 * count, rest).copy_(x.narrow(-1, 2 * count, rest));
  return out.to(x_in.scalar_type());
}

bool takes_cpu_kernel(const at::Tensor& x, const at::Tensor& cos) {
  return x.is_cpu() && x.dim() == 4 && x.scalar_type() == at::kFloat && x.stride(3) == 1 &&
         cos.scalar_type() == at::kFloat && cos.is_contiguous() &&
         (cos.dim() == 2 || cos.size(0) == x.size(0));
}

// The same in one pass, x [B, T, H, D].
at::Tensor rotate_by_cpu_kernel(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                bool interleaved, double sign) {
  const std::int64_t T = x.size(1), count = cos.size(-1);
  const at::Tensor out = at::empty(x.sizes(), x.options());
  const cpu::RopeTurn turn{x.size(2),
                           x.size(3),
                           x.stride(2),
                           count,
                           interleaved ? RopePairs::kInterleaved : RopePairs::kHalfSplit,
                           static_cast<float>(sign)};
  const float *from = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(),
              *s = sin.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  constexpr std::int64_t kGrain = 32768;  // numbers, about ten microseconds
  const std::int64_t a_token = std::max<std::int64_t>(x.size(2) * x.size(3), 1);
  at::parallel_for(
      0, x.size(0) * T, kGrain / a_token + 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t b = i / T, t = i % T, row = (cos.dim() == 3 ? i : t) * count;
          cpu::turn_token(turn, from + b * x.stride(0) + t * x.stride(1), c + row, s + row,
                          to + i * a_token);
        }
      });
  return out;
}

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                   bool interleaved, double sign) {
  return takes_cpu_kernel(x, cos)
             ? rotate_by_cpu_kernel(x, cos, sin.contiguous(), interleaved, sign)
             : rotate(x, cos, sin, interleaved, sign);
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, bool interleaved) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["interleaved"] = interleaved;
    return rotated(x, cos, sin, interleaved, 1);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool interleaved = ctx->saved_data["interleaved"].toBool();
    return {rotated(grads[0], saved[0], saved[1], interleaved, -1), {}, {}, {}};
  }
};

}  // namespace

RopeTable make_rope_table(std::span<const std::int64_t> positions, std::int64_t batch,
                          std::span<const double> frequencies, RopePairs pairs,
                          at::ScalarType dtype, at::Device device) {
  for (const std::int64_t position : positions)
    TORCH_CHECK_VALUE(position >= 0, "rope: position ", position, " is negative");
  const auto count = static_cast<std::int64_t>(frequencies.size());
  const auto tokens =
      static_cast<std::int64_t>(positions.size()) / std::max<std::int64_t>(batch, 1);
  const auto shape = batch > 1 ? std::vector<std::int64_t>{batch, tokens, count}
                               : std::vector<std::int64_t>{tokens, count};
  const bool wide = dtype == at::kDouble;
  const auto options = at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat);
  at::Tensor cos = at::empty(shape, options), sin = at::empty(shape, options);
  if (wide) {
    rope_angles(positions, frequencies, cos.mutable_data_ptr<double>(),
                sin.mutable_data_ptr<double>());
  } else {
    rope_angles(positions, frequencies, cos.mutable_data_ptr<float>(),
                sin.mutable_data_ptr<float>());
  }
  return {cos.to(device), sin.to(device), pairs};
}

at::Tensor apply_rope(const at::Tensor& x_BTHD, const RopeTable& table) {
  TORCH_CHECK_VALUE(x_BTHD.dim() >= 3 && table.cos.size(-2) == x_BTHD.size(-3) &&
                        2 * table.cos.size(-1) <= x_BTHD.size(-1),
                    "rope: a table of shape ", table.cos.sizes(),
                    " (positions, pairs) does not fit x of shape ", x_BTHD.sizes(),
                    "; [.., T, H, D] with T positions and 2 pairs <= D is needed");
  return RopeFunction::apply(x_BTHD, table.cos, table.sin, table.pairs == RopePairs::kInterleaved);
}

}  // namespace everlong
