// Loss and gradients of one batch, with the state carried the way the run wants it.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "data/batches.h"
#include "models/decoder.h"

namespace everlong {

enum class Carry {
  kNone,      // every row starts fresh
  kDetached,  // state goes from segment to segment and from row to row, gradients stop at the
              // border
  kExact,     // as kDetached from row to row; inside a row gradients pass every border
};
// "none", "detached" or "exact", as the run file checked.
Carry carry_from_name(const std::string& name);

// How the same columns of every row of a batch are fed as sequences. Legend: B rows, N sequences.
struct SegmentPlan {
  std::int64_t first = 0, tokens = 0;  // columns [first, first + tokens) of each row
  // Empty offsets where no document starts inside the segment: [B, tokens], N = B, which is the
  // faster form. Else the rows lie end to end in one packed line.
  Sequences sequences = {};
  std::vector<std::int64_t> enter =
      {};  // N values: the row whose carried state goes on here, or -1: a fresh one
  std::vector<std::int64_t> leave = {};  // B values: the sequence that the row ends in
};
// Documents start with a fresh state, wherever they start. segment_tokens = 0: one segment.
std::vector<SegmentPlan> plan_segments(const Batch& batch, std::int64_t segment_tokens);

// Feeds batches to a model in training. Not thread safe; the model outlives it.
class Backprop {
 public:
  Backprop(Decoder& model, at::Device device, Carry carry, std::int64_t segment_tokens)
      : model_(model), device_(device), carry_(carry), segment_tokens_(segment_tokens) {}

  // Adds the gradient of scale * (sum of the batch's weighed losses, in nats) to the .grad of the
  // model's parameters and returns the sum (fp64 scalar on the device). `after_backward` runs after
  // each backward pass (one a segment): the place to move .grad elsewhere.
  //
  // kExact holds the activations of one segment. With F_s the segment's function (state in -> loss,
  // state out) the first walk keeps only the states h_s between segments; the second goes from the
  // last segment to the first and differentiates loss_s + <dL/dh_{s+1}, h_{s+1}>, which gives the
  // parameters' gradient and dL/dh_s.
  at::Tensor run(const Batch& batch, double scale,
                 const std::function<void()>& after_backward = {});

  // The sum of the losses alone: no gradients, state always carried.
  at::Tensor score(const Batch& batch);

  // State of the rows after the last batch (B sequences); none with kNone and before the first.
  const std::optional<ModelState>& carried() const { return carried_; }
  void reset() { carried_.reset(); }
  // Goes on from what carried() was: its tensors and positions, on any device. Refused, and nothing
  // changes, where they do not fit the model.
  Status restore_carried(const TensorMap& tensors, const std::vector<std::int64_t>& positions);

 private:
  struct Line {  // on the device
    at::Tensor inputs_BT, targets_BT;
    at::Tensor weights_BT;  // undefined: 1 each
    at::Tensor writes_BT;   // what layers/write_weighted.h takes; undefined: once each
  };
  Line on_device(const Batch& batch) const;
  ModelState entering(const ModelState& carried, const SegmentPlan& plan) const;
  at::Tensor hidden(const Line& line, const SegmentPlan& plan, ModelState* state);
  at::Tensor loss(const Line& line, const SegmentPlan& plan, ModelState* state);
  at::Tensor run_detached(const Line& line, const std::vector<SegmentPlan>& plans, double scale,
                          const std::function<void()>& after_backward);
  at::Tensor run_exact(const Line& line, const std::vector<SegmentPlan>& plans, double scale,
                       const std::function<void()>& after_backward);
  Decoder& model_;
  at::Device device_;
  Carry carry_;
  std::int64_t segment_tokens_;
  std::optional<ModelState> carried_;
};

}  // namespace everlong
