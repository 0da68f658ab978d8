#include "mechanisms/softmax/op_cuda.h"

#include <ATen/ATen.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "ops/cuda_device.h"
#include "ops/kernel_call.h"

namespace everlong::softmax {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t kMostDim = 256;
constexpr std::int64_t kMostOfAGrid = 65535;  // sequences and heads: a grid's last two dimensions
constexpr std::int64_t kMostCounted = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kPadding = 128;  // tokens that the kernels round a sequence up to, at most

// The library's backward sums dq with atomics, in the order of the moment, unless ATen's switch for
// deterministic algorithms is on; it has no argument for that. So the switch is on while the call
// is made, and afterwards as it was. It belongs to the process: meanwhile (some 0.1 ms; kernels are
// only enqueued) an operation without a deterministic form that another thread starts is refused
// by ATen. Calls from here keep out of each other's way by the mutex.
class DeterministicCall {
 public:
  DeterministicCall()
      : lock_(mutex()),
        was_on_(context().deterministicAlgorithms()),
        only_warned_(context().deterministicAlgorithmsWarnOnly()),
        filled_(context().deterministicFillUninitializedMemory()) {
    context().setDeterministicAlgorithms(true, /*warn_only=*/false);
    // The switch alone would also have every new tensor filled with NaN: O(T) writes for nothing.
    if (!was_on_) context().setDeterministicFillUninitializedMemory(false);
  }
  ~DeterministicCall() {
    context().setDeterministicFillUninitializedMemory(filled_);
    context().setDeterministicAlgorithms(was_on_, only_warned_);
  }
  DeterministicCall(const DeterministicCall&) = delete;
  DeterministicCall& operator=(const DeterministicCall&) = delete;

 private:
  static at::Context& context() { return at::globalContext(); }
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  std::lock_guard<std::mutex> lock_;
  bool was_on_, only_warned_, filled_;
};

// Everything of a call besides its tensors.
struct Job {
  std::int64_t queries = 0, keys = 0;  // of the longest sequence
  std::int64_t window = 0;
  double scale = 1;
  at::Tensor offsets = {};  // of packed sequences, int32 on the device; undefined: each row is one

  // Keys before its own that a token sees; nothing: all. (The right edge is the causal one.)
  std::optional<std::int64_t> left() const {
    return window > 0 && window < keys ? std::optional(window - 1) : std::nullopt;
  }
};

// [B, T, H, K] and [B, S, G, K], or [T, H, K] and [T, G, K] with the offsets of the job. With
// is_causal the kernels align token T - 1 with key S - 1, as op.h does.
struct FlashFunction : torch::autograd::Function<FlashFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_given,
                            const at::Tensor& k_given, const at::Tensor& v_given, const Job& job) {
    const at::Tensor q = with_aligned_rows(q_given), k = with_aligned_rows(k_given),
                     v = with_aligned_rows(v_given);
    const auto offsets = job.offsets.defined() ? std::optional(job.offsets) : std::nullopt;
    const auto results = at::_flash_attention_forward(
        q, k, v, offsets, offsets, job.queries, job.keys, /*dropout_p=*/0, /*is_causal=*/true,
        /*return_debug_mask=*/false, job.scale, job.left());
    const at::Tensor out = std::get<0>(results).contiguous();  // it comes with the strides of q
    // The last two are dropout's: not read without it, but asked for.
    ctx->save_for_backward(
        {q, k, v, out, std::get<1>(results), std::get<2>(results), std::get<3>(results)});
    ctx->saved_data["job"] = hold(job);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto job = held<Job>(ctx->saved_data["job"]);
    const at::Tensor grad_o = with_aligned_rows(grads[0]);
    const DeterministicCall deterministic;
    auto [dq, dk, dv] = at::_flash_attention_backward(
        grad_o, saved[0], saved[1], saved[2], saved[3], saved[4], job.offsets, job.offsets,
        job.queries, job.keys, /*dropout_p=*/0, /*is_causal=*/true, saved[5], saved[6], job.scale,
        job.left());
    return {dq, dk, dv, at::Tensor()};
  }
};

at::Tensor attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       std::int64_t window, double scale) {
  const std::int64_t B = q.size(0), T = q.size(1), S = k.size(1);
  const Job job{T, S, window, scale};
  // The backward finds a row's dq by products of 32 bits; that of the only row begins at 0.
  if (B == 1 || (T + kPadding) * q.size(2) * kMostDim <= kMostCounted)
    return FlashFunction::apply(q, k, v, job);
  std::vector<at::Tensor> rows;
  for (std::int64_t b = 0; b < B; ++b)
    rows.push_back(
        FlashFunction::apply(q.narrow(0, b, 1), k.narrow(0, b, 1), v.narrow(0, b, 1), job));
  return at::cat(rows);
}

}  // namespace

std::string why_not_flash(at::Device device, at::ScalarType dtype, std::int64_t key_dim,
                          std::int64_t value_dim) {
  if (!device.is_cuda()) return "not on a GPU";
  if (compute_capability(device) < 80)
    return "the GPU is older than Ampere (sm_80), or this build has no CUDA";
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return "it takes bf16 and fp16 only";
  if (key_dim != value_dim) return "keys and values have different dims";
  if (key_dim % 8 != 0 || key_dim > kMostDim)
    return cat("head dims must be multiples of 8 up to ", kMostDim);
  return {};
}

Status check_flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   std::span<const std::int64_t> offsets) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || k.scalar_type() != q.scalar_type() ||
      v.scalar_type() != q.scalar_type() || k.device() != q.device() || v.device() != q.device())
    return unsupported(
        "softmax: FlashAttention takes q, k and v [B, T, H, D] of one dtype on one device");
  const std::string why = why_not_flash(q.device(), q.scalar_type(), q.size(3), v.size(3));
  if (!why.empty())
    return unsupported("softmax: FlashAttention cannot run this call: ", why,
                       " (form composite takes any)");
  const std::int64_t T = q.size(1), H = q.size(2), S = k.size(1),
                     N = offsets.empty() ? q.size(0) : std::ssize(offsets) - 1;
  if (q.numel() == 0 || T > S)
    return unsupported("softmax: FlashAttention was given ", T, " tokens and ", S,
                       " keys; it takes at least one token, and a key for each");
  if (N > kMostOfAGrid || H > kMostOfAGrid || S > kMostCounted - kPadding ||
      (q.size(0) * T + N * kPadding) * H > kMostCounted)
    return unsupported("softmax: FlashAttention was given ", N, " sequences of ", H, " heads, ",
                       q.size(0) * T, " tokens and ", S, " keys a row; it takes ", kMostOfAGrid,
                       " sequences and heads and counts tokens times heads in 32 bits");
  return {};
}

at::Tensor attention_by_flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              std::span<const std::int64_t> offsets, std::int64_t window,
                              double scale) {
  if (offsets.empty()) return attend_rows(q, k, v, window, scale);
  // Empty sequences own nothing, and equal ones are rows. The kernels need both: their case for
  // single tokens counts on a token in each sequence.
  std::vector<std::int64_t> starts(offsets.begin(), offsets.end());
  starts.erase(std::ranges::unique(starts).begin(), starts.end());
  std::int64_t longest = 0, shortest = q.size(1);
  for (std::size_t n = 1; n < starts.size(); ++n) {
    longest = std::max(longest, starts[n] - starts[n - 1]);
    shortest = std::min(shortest, starts[n] - starts[n - 1]);
  }
  const auto line = [](const at::Tensor& x_1TH) { return x_1TH.squeeze(0); };
  if (longest == shortest) {
    const auto rows = [&](const at::Tensor& x) { return line(x).unflatten(0, {-1, longest}); };
    return attend_rows(rows(q), rows(k), rows(v), window, scale).flatten(0, 1).unsqueeze(0);
  }
  const std::vector<std::int32_t> counted(starts.begin(), starts.end());
  const Job job{longest, longest, window, scale, send_to_device(counted, q.device())};
  return FlashFunction::apply(line(q), line(k), line(v), job).unsqueeze(0);
}

}  // namespace everlong::softmax
