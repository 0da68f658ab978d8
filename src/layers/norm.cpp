#include "layers/norm.h"

#include <ATen/ATen.h>

#include "layers/weights.h"
#include "ops/rms_norm.h"

namespace everlong {
namespace {

class SimpleRmsNorm final : public Norm {
 public:
  explicit SimpleRmsNorm(double eps) : eps_(eps) {}
  at::Tensor forward(const at::Tensor& x) override { return simple_rms_norm(x, eps_); }

 private:
  double eps_;
};

class RmsNorm final : public Norm {
 public:
  RmsNorm(std::int64_t size, double eps)
      : eps_(eps), weight_(register_parameter("weight", constant_weight({size}, 1))) {}
  at::Tensor forward(const at::Tensor& x) override { return rms_norm(x, weight_, eps_); }

 private:
  double eps_;
  at::Tensor weight_;
};

// (x - mean) / sqrt(variance + eps) times a weight, fp32 inside (fp64 stays fp64).
class LayerNorm final : public Norm {
 public:
  LayerNorm(std::int64_t size, double eps)
      : eps_(eps), weight_(register_parameter("weight", constant_weight({size}, 1))) {}
  at::Tensor forward(const at::Tensor& x) override {
    return at::layer_norm(x, {weight_.size(0)}, weight_, {}, eps_);
  }

 private:
  double eps_;
  at::Tensor weight_;
};

}  // namespace

at::Tensor simple_rms_norm(const at::Tensor& x, double eps) { return rms_norm(x, {}, eps); }

Result<std::shared_ptr<Norm>> make_norm(const std::string& name, std::int64_t size, double eps) {
  if (name == "srms") return std::shared_ptr<Norm>(std::make_shared<SimpleRmsNorm>(eps));
  if (name == "rms") return std::shared_ptr<Norm>(std::make_shared<RmsNorm>(size, eps));
  if (name == "layer") return std::shared_ptr<Norm>(std::make_shared<LayerNorm>(size, eps));
  return invalid_argument("\"", name, "\" is not a norm; known: layer, rms, srms");
}

}  // namespace everlong
