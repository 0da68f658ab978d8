// Tiles, stages and registers of a block of the forward pass (kernel_sm90_engine.cuh), by the dims
// that it is made for.
#pragma once
#include "mechanisms/lightning/kernel_sm90_parts.cuh"

namespace everlong::lightning::engine {

// Registers of a thread of each role. Together no more than the block starts with: at_start times
// the warpgroups.
struct Registers {
  int at_start, copy, output, state;
};
constexpr Registers registers_of(int state_groups, bool fused) {
  if (state_groups == 1) return fused ? Registers{168, 48, 224, 216} : Registers{168, 24, 240, 240};
  if (state_groups == 2) return fused ? Registers{128, 48, 208, 128} : Registers{128, 24, 184, 152};
  return {80, 24, 136, 80};
}
// What fits beside S and the outputs. 2 and 3 stages of 48 KB differ by less than 1 %; 144 KB in
// flight ride out more jitter.
constexpr int stages_of(int stage_bytes) {
  const int kilobytes = stage_bytes / 1024;
  return kilobytes > 56 ? 2 : kilobytes > 40 ? 3 : kilobytes > 24 ? 4 : 6;
}

template <int kKeys, int kValues, bool kFused>
struct ForwardShape {
  static_assert(kKeys % 32 == 0 && kValues % 32 == 0);
  static constexpr int kColumns = panel_columns(kKeys, kValues);  // of a panel
  using Panel = hopper::Panel<kColumns>;
  static constexpr int kPanel = kChunk * Panel::kRow, kOutPanel = kOutRows * Panel::kRow;
  static constexpr int kKeyPanels = Panel::of(kKeys), kValuePanels = Panel::of(kValues);
  static constexpr int kKeyTile = kPanel * kKeyPanels, kValueTile = kPanel * kValuePanels;
  static constexpr int kStage = 2 * kKeyTile + kValueTile;  // q, k, v
  static constexpr int kStages = stages_of(kStage);

  static constexpr int kStateGroups = groups_of(kKeys);
  static constexpr int kWarpgroups = 2 + kStateGroups, kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kStatePanel = kStateGroups * 64 * Panel::kRow;  // all rows of S
  static constexpr Registers kRegisters = registers_of(kStateGroups, kFused);
  static_assert(kRegisters.copy + kRegisters.output + kStateGroups * kRegisters.state <=
                kRegisters.at_start * kWarpgroups);

  struct Shared {
    alignas(1024) unsigned char stage[kStages][kStage];
    unsigned char state[kValuePanels * kStatePanel];
    unsigned char out[4][kValuePanels * kOutPanel];
    Barriers<kStages> barriers;
  };
};

}  // namespace everlong::lightning::engine
