// Angles of rotary position embedding (RoFormer, 2104.09864, eq. 14-15): pair i of a vector at
// position p turns by p * theta^(-2i / rotary_dim).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace everlong {

// Which two coordinates form pair i of the first rotary_dim ones.
enum class RopePairs {
  kHalfSplit,    // (i, i + rotary_dim / 2): Llama's published weights
  kInterleaved,  // (2i, 2i + 1): the paper
};

// theta^(-2i / rotary_dim) for i < rotary_dim / 2; rotary_dim even.
std::vector<double> rope_frequencies(double theta, std::int64_t rotary_dim);

// Writes cos and sin of position * frequency, [positions, frequencies] row-major. Everything in
// double, rounded once: the error of an angle is position * 1e-16, so a position of 1e9 keeps the
// accuracy of fp32. Positions >= 0. Each row depends on its own position alone, so any cut of a
// text gets the same bits.
void rope_angles(std::span<const std::int64_t> positions, std::span<const double> frequencies,
                 float* cos, float* sin);
void rope_angles(std::span<const std::int64_t> positions, std::span<const double> frequencies,
                 double* cos, double* sin);

}  // namespace everlong
