#include "layers/weights.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "layers/linear.h"

namespace everlong {
namespace {

// Bytes of this process in memory.
std::int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  std::int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

TEST(Weights, DrawnOnesFollowTheirLaw) {
  at::manual_seed(1);
  const at::Tensor weight = normal_weight({300, 200}, 0.5);
  EXPECT_NEAR(weight.std().item<double>(), 0.5, 0.01);  // 60,000 draws: 7 sigma
  EXPECT_TRUE(constant_weight({4}, 3).equal(at::full({4}, 3.0F)));
  EXPECT_TRUE(weight_from(at::arange(3, at::kDouble)).equal(at::arange(3, at::kFloat)));
}

TEST(Weights, MetaOnesHaveAShapeAndNoMemory) {
  const WeightInitScope scope(WeightInit::kMeta);
  const Linear layer(std::int64_t{1} << 20, std::int64_t{1} << 20);  // 4 TiB
  EXPECT_TRUE(layer.weight().is_meta());
  EXPECT_EQ(layer.weight().numel(), std::int64_t{1} << 40);
  EXPECT_TRUE(constant_weight({3}, 1).is_meta());
  EXPECT_TRUE(weight_from(at::ones({3})).is_meta());
}

TEST(Weights, UnfilledOnesTakeNoPages) {
  const std::int64_t before = resident_bytes();
  const WeightInitScope scope(WeightInit::kUnfilled);
  const Linear layer(1 << 14, 1 << 14);  // 1 GiB
  EXPECT_FALSE(layer.weight().is_meta());
  EXPECT_LT(resident_bytes() - before, std::int64_t{1} << 26);
}

TEST(Weights, AScopeEndsAndNests) {
  {
    const WeightInitScope outer(WeightInit::kMeta);
    {
      const WeightInitScope inner(WeightInit::kDrawn);
      EXPECT_FALSE(normal_weight({2}, 1).is_meta());
    }
    EXPECT_TRUE(normal_weight({2}, 1).is_meta());
  }
  EXPECT_FALSE(normal_weight({2}, 1).is_meta());
}

}  // namespace
}  // namespace everlong
