#include "train/gates.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "layers/gated.h"

namespace everlong {
namespace {

constexpr double kStuckSpread = 0.02;
constexpr std::int64_t kStuckSteps = 1000;

}  // namespace

std::optional<GateReport> gates_of(const Decoder& model) {
  GateReport report;
  bool any = false;
  for (std::int64_t i = 0; i < model.config().num_layers(); ++i) {
    const auto* gated = dynamic_cast<const Gated*>(&model.mixer(i));
    if (gated == nullptr) continue;
    const at::Tensor values = gated->gate_values().to(at::kCPU, at::kFloat).contiguous();
    for (std::int64_t j = 0; j < values.numel(); ++j) {
      const double g = values.const_data_ptr<float>()[j];
      any = true;
      ++report.histogram[static_cast<std::size_t>(std::clamp(g * 10, 0.0, 9.0))];
      report.smallest = std::min(report.smallest, g);
      report.largest = std::max(report.largest, g);
    }
  }
  return any ? std::optional(report) : std::nullopt;
}

std::optional<std::string> gate_alarm(const GateReport& report, std::int64_t step) {
  if (step < kStuckSteps || report.spread() >= kStuckSpread) return std::nullopt;
  return cat("after ", step, " steps all gates lie between ", fixed(report.smallest, 3), " and ",
             fixed(report.largest, 3),
             "; they have not learned what to remember. Raise gate_learning_rate (10 to 100 times "
             "learning_rate) and train on texts of more segments");
}

}  // namespace everlong
