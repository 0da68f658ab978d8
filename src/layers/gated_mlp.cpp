#include "layers/gated_mlp.h"

#include <ATen/ATen.h>

#include "layers/linear.h"

namespace everlong {
namespace {

struct Names {
  const char *gate, *up, *down;
};

class Mlp final : public GatedMlp {
 public:
  Mlp(const Names& names, bool silu, std::int64_t hidden, std::int64_t intermediate,
      std::int64_t num_layers)
      : silu_(silu),
        gate_(register_module(names.gate, std::make_shared<Linear>(hidden, intermediate))),
        up_(register_module(names.up, std::make_shared<Linear>(hidden, intermediate))),
        down_(register_module(names.down, std::make_shared<Linear>(intermediate, hidden,
                                                                   residual_gain(num_layers)))) {}

  at::Tensor forward(const at::Tensor& x) override {
    const at::Tensor gate = gate_->forward(x);
    return down_->forward((silu_ ? at::silu(gate) : gate) * up_->forward(x));
  }

 private:
  bool silu_;
  std::shared_ptr<Linear> gate_, up_, down_;
};

class GeluMlp final : public GatedMlp {
 public:
  GeluMlp(std::int64_t hidden, std::int64_t intermediate, std::int64_t num_layers)
      : c_fc_(register_module("c_fc", std::make_shared<Linear>(hidden, intermediate))),
        c_proj_(register_module(
            "c_proj", std::make_shared<Linear>(intermediate, hidden, residual_gain(num_layers)))) {}

  at::Tensor forward(const at::Tensor& x) override {
    return c_proj_->forward(at::gelu(c_fc_->forward(x)));
  }

 private:
  std::shared_ptr<Linear> c_fc_, c_proj_;
};

}  // namespace

Result<std::shared_ptr<GatedMlp>> make_gated_mlp(const std::string& name, std::int64_t hidden_size,
                                                 std::int64_t intermediate_size,
                                                 std::int64_t num_layers) {
  if (name == "gelu")
    return std::shared_ptr<GatedMlp>(
        std::make_shared<GeluMlp>(hidden_size, intermediate_size, num_layers));
  if (name != "sglu" && name != "swiglu" && name != "expert")
    return invalid_argument("\"", name, "\" is not a gated MLP; known: expert, gelu, sglu, swiglu");
  const bool silu = name != "sglu";
  const Names names = name == "swiglu" ? Names{"gate_proj", "up_proj", "down_proj"}
                      : name == "sglu" ? Names{"l1", "l2", "l3"}
                                       : Names{"w1", "w3", "w2"};
  return std::shared_ptr<GatedMlp>(
      std::make_shared<Mlp>(names, silu, hidden_size, intermediate_size, num_layers));
}

}  // namespace everlong
