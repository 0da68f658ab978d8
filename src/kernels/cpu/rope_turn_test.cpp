#include "kernels/cpu/rope_turn.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/random.h"
#include "kernels/cpu/every_target_test.h"

namespace everlong::cpu {
namespace {

// Counts around the lanes of every target, rows apart, coordinates that do not turn.
TEST(RopeTurn, EveryTargetTurnsEveryPair) {
  for (const RopePairs pairs : {RopePairs::kHalfSplit, RopePairs::kInterleaved})
    for (const std::int64_t count : {1, 3, 4, 8, 15, 16, 17, 40})
      for (const float sign : {1.0F, -1.0F}) {
        const std::int64_t heads = 3, dim = 2 * count + 5, stride = dim + 7;
        Random random{static_cast<std::uint64_t>(count)};
        const auto draw = [&](std::int64_t n) {
          std::vector<float> x(static_cast<std::size_t>(n));
          for (float& value : x) value = static_cast<float>(2 * random.share() - 1);
          return x;
        };
        const std::vector<float> x = draw(heads * stride), cos = draw(count), sin = draw(count);
        on_every_target([&] {
          std::vector<float> out(static_cast<std::size_t>(heads * dim), NAN);
          turn_token({heads, dim, stride, count, pairs, sign}, x.data(), cos.data(), sin.data(),
                     out.data());
          for (std::int64_t h = 0; h < heads; ++h)
            for (std::int64_t c = 0; c < dim; ++c) {
              const auto own = [&](std::int64_t i) {
                return double{x[static_cast<std::size_t>(h * stride + i)]};
              };
              double wanted = own(c);
              if (c < 2 * count) {
                const bool split = pairs == RopePairs::kHalfSplit;
                const std::int64_t i = split ? c % count : c / 2;
                const bool first = split ? c < count : c % 2 == 0;
                const std::int64_t other =
                    split ? (first ? c + count : c - count) : (first ? c + 1 : c - 1);
                const auto at = static_cast<std::size_t>(i);
                wanted = own(c) * cos[at] + (first ? -1 : 1) * sign * own(other) * sin[at];
              }
              EXPECT_NEAR(out[static_cast<std::size_t>(h * dim + c)], wanted, 4e-7)
                  << "count " << count << ", coordinate " << c;
            }
        });
      }
}

}  // namespace
}  // namespace everlong::cpu
