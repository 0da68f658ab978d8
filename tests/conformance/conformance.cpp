// The ten laws over the registry. Names end in _Cpu or _Cuda; the second run under label gpu, on a
// machine with one.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>

#include "laws.h"
#include "ops/runtime.h"

namespace everlong::laws {
namespace {

constexpr std::size_t kShown = 12;

void expect_none(const Violations& broken) {
  std::string text;
  for (std::size_t i = 0; i < std::min(broken.size(), kShown); ++i) text += "\n  " + broken[i];
  EXPECT_TRUE(broken.empty()) << broken.size() << " violations:" << text;
}

struct OperatorCase {
  const Mechanism* room;
  const Operator* op;
  at::DeviceType device;
};
struct RoomCase {
  const Mechanism* room;
  at::DeviceType device;
};

std::string device_name(at::DeviceType device) { return device == at::kCPU ? "Cpu" : "Cuda"; }

std::vector<OperatorCase> operator_cases(at::DeviceType device) {
  std::vector<OperatorCase> cases;
  for (const Mechanism* room : mechanisms())
    for (const Operator* op : room->operators)
      if (op->is_sequence()) cases.push_back({room, op, device});
  return cases;
}
std::vector<OperatorCase> operator_cases() {
  auto cases = operator_cases(at::kCPU);
  for (const auto& gpu : operator_cases(at::kCUDA)) cases.push_back(gpu);
  return cases;
}
std::vector<RoomCase> room_cases() {
  std::vector<RoomCase> cases;
  for (const auto device : {at::kCPU, at::kCUDA})
    for (const Mechanism* room : mechanisms()) cases.push_back({room, device});
  return cases;
}

class OperatorLaws : public testing::TestWithParam<OperatorCase> {
 protected:
  const Operator& op() const { return *GetParam().op; }
  at::Device device() const { return at::Device(GetParam().device); }
};
class LayerLaws : public testing::TestWithParam<RoomCase> {
 protected:
  LayerCase layer() const { return layer_case(*GetParam().room, device()); }
  at::Device device() const { return at::Device(GetParam().device); }
};

TEST_P(OperatorLaws, Law1FormsAgree) { expect_none(forms_agree(op(), device())); }
TEST_P(OperatorLaws, Law2AnySplitIsOnePass) { expect_none(any_split_is_one_pass(op(), device())); }
TEST_P(OperatorLaws, Law2PackedIsOneByOne) { expect_none(packed_is_one_by_one(op(), device())); }
TEST_P(OperatorLaws, Law4GradientsAgree) { expect_none(gradients_agree(op(), device())); }
TEST_P(OperatorLaws, Law5PoisonIsOverwritten) {
  expect_none(poison_is_overwritten(op(), device()));
}
TEST_P(OperatorLaws, Law7SameInputSameBits) { expect_none(same_input_same_bits(op(), device())); }
TEST_P(OperatorLaws, Law8BadCallsAreRefused) { expect_none(bad_calls_are_refused(op(), device())); }
TEST_P(OperatorLaws, Law9AwkwardLengthsAndStrides) {
  expect_none(awkward_lengths_and_strides(op(), device()));
}
TEST_P(OperatorLaws, Law10PastIgnoresFuture) { expect_none(past_ignores_future(op(), device())); }

TEST_P(LayerLaws, Law2AnySplitIsOnePass) { expect_none(layer_split(layer(), device())); }
TEST_P(LayerLaws, Law2RaggedStreams) { expect_none(layer_ragged(layer(), device())); }
TEST_P(LayerLaws, Law3StateStaysInBound) { expect_none(state_stays_in_bound(layer(), device())); }
TEST_P(LayerLaws, Law6StateGoesOn) { expect_none(state_goes_on(layer(), device())); }
TEST_P(LayerLaws, Law8SettingsAreChecked) { expect_none(settings_are_checked(*GetParam().room)); }
TEST_P(LayerLaws, Law10PastIgnoresFuture) {
  expect_none(layer_past_ignores_future(layer(), device()));
}

// 4.3 GB a tensor in bf16, and some of them: asked of GPUs only.
class SlowLaws : public OperatorLaws {};
TEST_P(SlowLaws, Law9MoreThan2ToThe31Elements) {
  expect_none(more_than_2_to_the_31_elements(op(), device()));
}

const auto operator_name = [](const auto& info) {
  return info.param.room->name + "_" + std::string(info.param.op->kind()) + "_" +
         device_name(info.param.device);
};
const auto room_name = [](const auto& info) {
  return info.param.room->name + "_" + device_name(info.param.device);
};

INSTANTIATE_TEST_SUITE_P(Rooms, OperatorLaws, testing::ValuesIn(operator_cases()), operator_name);
INSTANTIATE_TEST_SUITE_P(Rooms, LayerLaws, testing::ValuesIn(room_cases()), room_name);
INSTANTIATE_TEST_SUITE_P(Rooms, SlowLaws, testing::ValuesIn(operator_cases(at::kCUDA)),
                         operator_name);

TEST(Registry, EveryLackSaysWhy) {
  for (const Mechanism* room : mechanisms()) {
    EXPECT_FALSE(room->operators.empty()) << room->name;
    for (const Lack& lack : room->lacks)
      EXPECT_GE(lack.why.size(), 20U) << room->name << ": " << lack.what;
  }
}

TEST(Registry, AnUnknownMechanismIsRefusedWithAGuess) {
  const auto found = find_mechanism("lighting");
  ASSERT_FALSE(found.ok());
  EXPECT_NE(found.status().message().find("Did you mean \"lightning\"?"), std::string::npos)
      << found.status().message();
}

}  // namespace
}  // namespace everlong::laws

int main(int argc, char** argv) {
  // Threads that spin while they wait take ten times as long on a machine with other work, and the
  // OpenMP runtime reads this before main does.
  if (std::getenv("OMP_WAIT_POLICY") == nullptr) {
    ::setenv("OMP_WAIT_POLICY", "passive", 1);
    ::execv("/proc/self/exe", argv);
  }
  testing::InitGoogleTest(&argc, argv);
  // Before any other call of torch: afterwards CUDA would stay unknown. Without a GPU this fails,
  // and only the _Cuda cases need it.
  const std::string wanted =
      testing::GTEST_FLAG(filter).substr(0, testing::GTEST_FLAG(filter).find('-'));
  if (wanted.find("Cuda") != std::string::npos || wanted.find("Slow") != std::string::npos)
    if (const everlong::Status status = everlong::load_cuda_backend(); !status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      return 1;
    }
  return RUN_ALL_TESTS();
}
