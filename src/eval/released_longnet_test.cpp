#include "eval/released_longnet.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "mechanisms/longnet/op_call.h"
#include "mechanisms/mechanism.h"

namespace everlong {
namespace {

const Operator& dilated() {
  for (const Operator* op : (*find_mechanism("longnet"))->operators)
    if (op->kind() == "dilated_attention") return *op;
  throw std::runtime_error("longnet has no dilated_attention");
}

// fp32, with incoming gradients.
OpCall call_of(std::int64_t tokens, std::int64_t heads, const nlohmann::json& params) {
  OpCall call = dilated().sample({.batch = 2,
                                  .tokens = tokens,
                                  .heads = heads,
                                  .kv_heads = heads,
                                  .key_dim = 16,
                                  .value_dim = 16,
                                  .params = params});
  for (auto& [name, x] : call.inputs) x = x.to(at::kFloat);
  at::manual_seed(1);
  call.grad_out["o"] = at::randn({2, tokens, heads, 16});
  return call;
}

// Heads that the ratio divides and heads that it pads; a last segment cut short; a segment longer
// than the text.
TEST(ReleasedLongnet, EqualsTheRoomWithBlockOffsetsAndTheDetachedGradient) {
  for (const std::int64_t heads : {3, 4, 8})
    for (const std::int64_t tokens : {64, 72}) {
      const OpCall call =
          call_of(tokens, heads, {{"segment_length", {16, 32, 128}}, {"dilated_ratio", {1, 2, 4}}});
      const auto work = released_longnet_work(dilated(), "naive", call);
      EXPECT_TRUE(work.ok()) << work.status().message();
    }
}

// The comparison can fail: against the gradient with the mixing in it and the paper's offsets the
// same rows differ by far more than rounding.
TEST(ReleasedLongnet, DiffersFromThePapersOffsets) {
  const OpCall call = call_of(64, 8, {{"segment_length", {16, 32}}, {"dilated_ratio", {1, 2}}});
  const auto params = longnet::read_call(call);
  ASSERT_TRUE(params.ok());
  const auto released = *released_dilated_attention(call.inputs.at("q"), call.inputs.at("k"),
                                                    call.inputs.at("v"), params->geometry);
  const auto room = dilated().run("naive", call);
  ASSERT_TRUE(room.ok());
  EXPECT_GT((released - room->out.at("o")).abs().max().item<float>(), 0.1);
}

TEST(ReleasedLongnet, RefusesWhatTheReleasedCodeGetsWrong) {
  const auto ratio = released_longnet_work(
      dilated(), "naive",
      call_of(64, 4, {{"segment_length", {16, 32}}, {"dilated_ratio", {1, 5}}}));
  ASSERT_FALSE(ratio.ok());
  EXPECT_NE(ratio.status().message().find("ratio 5 does not divide its segment of 32"),
            std::string::npos)
      << ratio.status().message();
  const auto grow = released_longnet_work(
      dilated(), "naive",
      call_of(64, 4,
              {{"segment_length", {16, 32}}, {"dilated_ratio", {1, 2}}, {"beyond", "grow"}}));
  ASSERT_FALSE(grow.ok());
  EXPECT_NE(grow.status().message().find("fixed"), std::string::npos);
}

}  // namespace
}  // namespace everlong
