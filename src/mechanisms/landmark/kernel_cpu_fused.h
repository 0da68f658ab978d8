// Sections of up to cpu::kTileKeys ordinary tokens in one go, which is what blocks of 51 or 64
// tokens are: softmax inside the section, gate and products without a result in between. SIMD,
// picked at run time. Legend: kernel_cpu_gate.h.
#pragma once
#include "mechanisms/landmark/kernel_cpu_gate.h"

namespace everlong::landmark {

// What the rows of a tile see of one section.
struct SectionView {
  cpu::Rows k, v;               // its ordinary tokens
  std::int64_t count = 0;       // of them, at most cpu::kTileKeys
  const float* gate = nullptr;  // [kTileRows] scores of its landmark, in units of log 2
  bool whole = false;           // every row sees all of it
  // [kTileRows]: how many of the tokens a row sees, from the first on; 1 where it sees the section
  // through its landmark, else 0.
  std::int32_t seen[cpu::kTileRows];
  float past[cpu::kTileRows];
  bool drop_empty = false;
};

// Forward of one tile. Queries are packed, times scale and log2(e). Tiles that follow one another
// on a thread share `shared`: load a section there once, then absorb it into each.
class FusedForward {
 public:
  static constexpr std::int64_t kMostTogether = 4;
  static std::int64_t shared_floats();
  static std::int64_t scratch_floats(int value_dim);
  FusedForward(const cpu::SoftmaxShape& shape, float* shared, float* scratch);

  void begin();
  // Whether all values of the section are finite.
  bool load(const cpu::Rows& k, const cpu::Rows& v, std::int64_t count);
  // The section that was loaded.
  void absorb(const float* queries, int rows, const SectionView& section, bool finite);
  void finish(int rows, const cpu::MutableRows& o, const cpu::MutableRows& lse) const;

 private:
  cpu::SoftmaxShape shape_;
  float *shared_, *scratch_;
};

// Backward of one section: begin, absorb every tile that sees it, finish. Tiles are loaded once for
// all the sections that they meet.
class FusedBackward {
 public:
  static std::int64_t scratch_floats(int key_dim, int value_dim);
  FusedBackward(const cpu::SoftmaxShape& shape, float* scratch);

  void begin(const cpu::Rows& k, const cpu::Rows& v, std::int64_t count);
  static constexpr std::int64_t kTileFloats = 2 * cpu::kTileRows * kKeyStride;
  void load(const cpu::Rows& q, const cpu::Rows& grad_o, int rows, float* tile) const;
  // Adds dq / scale to grad_q [kTileRows][padded key_dim]. lse, along [kTileRows]: L (natural
  // logarithm) and D of the rows. Writes the slopes of the gate, [kTileRows].
  void absorb(const float* tile, int rows, const SectionView& section, const float* lse,
              const float* along, float* grad_q, float* gate_slope);
  // Adds the gradients to fp32 rows [count][padded dim].
  void finish(float* grad_k, float* grad_v) const;

 private:
  cpu::SoftmaxShape shape_;
  float* scratch_;
  std::int64_t count_ = 0;
};

}  // namespace everlong::landmark
