#include "mechanisms/landmark/op.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "mechanisms/landmark/op_composite.h"
#include "mechanisms/landmark/op_cpu.h"
#include "mechanisms/landmark/op_naive.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {
namespace {

double checked_scale(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& marks, const Options& options) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
                        k.sizes().slice(0, 3) == v.sizes().slice(0, 3) && q.size(3) == k.size(3) &&
                        q.size(1) <= k.size(1),
                    "landmark: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
                    " do not fit; [B, T, H, K], [B, S, G, K], [B, S, G, V] with T <= S are needed");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                        q.is_floating_point() && q.device() == k.device() &&
                        q.device() == v.device(),
                    "landmark: q, k, v are ", q.scalar_type(), ", ", k.scalar_type(), ", ",
                    v.scalar_type(), " on ", q.device(), ", ", k.device(), ", ", v.device(),
                    "; one floating-point dtype and one device are needed");
  TORCH_CHECK_VALUE(marks.defined() && marks.is_cpu() && marks.dim() == 2 &&
                        marks.size(0) == k.size(0) && marks.size(1) == k.size(1) &&
                        (marks.scalar_type() == at::kBool || marks.scalar_type() == at::kByte),
                    "landmark: marks are ", marks.sizes(), " ", marks.scalar_type(),
                    "; bool or uint8 [", k.size(0), ", ", k.size(1), "] on the CPU is needed");
  Params params;
  params.heads = q.size(2);
  params.kv_heads = k.size(2);
  params.key_dim = q.size(3);
  params.value_dim = v.size(3);
  params.scale = options.scale.value_or(default_scale(std::max<std::int64_t>(q.size(3), 1)));
  throw_if_error(validate(params));
  return params.scale;
}

bool takes_cpu_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const Options& options) {
  if (options.path == Path::kComposite) return false;
  const Status status = check_cpu_kernel(q, k, v);
  if (options.path == Path::kCpu) throw_if_error(status);
  return status.ok();
}

}  // namespace

std::string_view path_taken(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Options& options) {
  return takes_cpu_kernel(q, k, v, options) ? "cpu" : "composite";
}

Attended attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& marks, const Options& options) {
  const double scale = checked_scale(q, k, v, marks, options);
  return takes_cpu_kernel(q, k, v, options)
             ? attention_by_cpu_kernel(q, k, v, marks, scale, options.drop_empty)
             : attention_by_composite(q, k, v, marks, scale, options.drop_empty);
}

at::Tensor naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& marks, const Options& options) {
  const double scale = checked_scale(q, k, v, marks, options);
  return weighted_values(naive_weights(q, k, marks, scale, options.drop_empty).weights, v);
}

at::Tensor grouped_softmax(const at::Tensor& scores, const at::Tensor& marks, std::int64_t prefix,
                           bool drop_empty) {
  TORCH_CHECK_VALUE(
      scores.dim() == 4 && scores.is_floating_point() && prefix >= 0 &&
          prefix + scores.size(2) <= scores.size(3) && marks.dim() == 2 && marks.is_cpu() &&
          marks.size(0) == scores.size(0) && marks.size(1) == scores.size(3),
      "landmark: scores ", scores.sizes(), ", marks ", marks.sizes(), ", prefix ", prefix,
      " do not fit; [B, H, T, S], [B, S] on the CPU and prefix + T <= S are ", "needed");
  return group_scores(scores, marks, prefix, drop_empty).weights;
}

}  // namespace everlong::landmark
