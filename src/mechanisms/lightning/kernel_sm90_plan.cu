// How the chunks of a call are shared out among the blocks of Hopper's engine.
#include "mechanisms/lightning/kernel_sm90_plan.h"

#include <algorithm>

namespace everlong::lightning::engine {
namespace {

// Costs in chunks at the rate of a GPU whose memory is busy, as measured. A chunk that only the
// state sees moves two tiles of four; in front of others it costs more than that.
constexpr double kStateOnly = 0.5, kWarmUp = 0.9;
constexpr double kStart = 2.5, kSecondLaunch = 5;  // of a part, of a kernel
constexpr double kSegment = 1.5;  // of a head of a packed sequence: states, its end

// What a block alone on the memory takes for a chunk, the time of its products, and where only the
// state sees it.
struct Alone {
  double chunk, state;
};
constexpr Alone alone(bool fused) { return fused ? Alone{1.05, 0.8} : Alone{0.65, 0.37}; }

// Cuts the line into `ranges` ranges of at most `budget` each; returns what is left over. warm[h]:
// chunks of warm-up of a range that starts within head h.
int cut_line(int chunks, int line, int ranges, double budget, std::span<const int> warm, int* cut) {
  const int heads = static_cast<int>(warm.size());
  int position = 0;
  for (int i = 0; i < ranges; ++i) {
    cut[i] = position;
    const int unit = position / chunks, before = position - unit * chunks;
    const int taken = static_cast<int>(
        budget - kWarmUp * std::min(before, warm[static_cast<std::size_t>(unit % heads)]));
    if (taken > 0) position = std::min(line, position + taken);
  }
  cut[ranges] = position;
  return line - position;
}

Plan plan_rows(const Pass& pass, int chunks, int units, int processors) {
  Plan plan;
  const double share = static_cast<double>(units) * chunks / processors;  // of the whole line
  // Blocks of one length share the memory; at the end the last round is what is left.
  const auto cost = [&](std::int64_t blocks, double length) {
    const double rounds = static_cast<double>((blocks + processors - 1) / processors);
    return std::max(static_cast<double>(blocks) * length / processors,
                    alone(pass.fused).chunk * rounds * length);
  };
  std::array<int, kCudaMaxHeads> warm;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    warm[h] = warm_chunks(static_cast<float>(pass.slope_H[h]));
  const std::span<const int> warm_H(warm.data(), pass.slope_H.size());
  // The states of all parts but the last, one block each.
  const auto states_cost = [&](int parts, int length) {
    double sum = 0;
    int longest = 0;
    for (const int warm_h : warm_H) {
      const int used = pass.exact ? length : std::min(length, warm_h);
      sum += used;
      longest = std::max(longest, used);
    }
    const double heads = static_cast<double>(warm_H.size());
    return std::max(sum / heads * units * (parts - 1) / processors * kStateOnly,
                    longest * alone(pass.fused).state);
  };
  double best = cost(units, chunks);
  if (pass.workspace != nullptr && units < processors)
    for (const int parts : {processors / units, processors / units + 1, 2 * processors / units}) {
      if (parts < 2 || parts > chunks || parts > kMaxRanges) continue;
      const int length = (chunks + parts - 1) / parts;
      const int rounds = (units * parts + processors - 1) / processors;
      const double both = cost(std::int64_t{units} * parts, length) + states_cost(parts, length) +
                          kSecondLaunch + kStart * rounds;
      if (both < best) best = both, plan.parts = parts;
    }
  if (pass.exact || best <= share * 1.001) return plan;

  // The least budget that reaches the end of the line, from below.
  for (double budget = share + 1; budget < best;) {
    const int left = cut_line(chunks, units * chunks, processors, budget, warm_H, plan.cut.data());
    if (left == 0) {
      plan.ranges = processors;
      plan.parts = 1;
      return plan;
    }
    budget += std::max(static_cast<double>(left) / processors, 0.001 * share);
  }
  return plan;
}

// The same for packed sequences, where a unit costs kSegment besides its chunks. exact: cuts
// between units only.
int cut_packed_line(std::span<const std::int64_t> cu_seqlens, int line, int ranges, double budget,
                    std::span<const int> warm, bool exact, int* cut) {
  const int heads = static_cast<int>(warm.size());
  int position = 0, before = 0;  // before: chunks of the sequences ahead of this one
  std::size_t sequence = 0;
  const auto chunks = [&] { return chunks_of(cu_seqlens[sequence + 1] - cu_seqlens[sequence]); };
  for (int i = 0; i < ranges; ++i) {
    cut[i] = position;
    double left = budget;
    while (position < line) {
      while (position >= before + heads * chunks()) before += heads * chunks(), ++sequence;
      const int length = chunks(), head = (position - before) / length,
                ahead = (position - before) % length;
      if (ahead > 0) left -= kWarmUp * std::min(ahead, warm[static_cast<std::size_t>(head)]);
      // The rest of this head, then as many whole ones as fit.
      const double whole = length + kSegment, rest = whole - ahead;
      if (left >= rest) {
        const int more = static_cast<int>(std::min((left - rest) / whole, heads - 1.0 - head));
        position += length - ahead + more * length;
        left -= rest + more * whole;
        continue;
      }
      if (exact)
        position += position == cut[i] ? length : 0;
      else
        position += std::max(0, static_cast<int>(left - kSegment));
      break;
    }
  }
  cut[ranges] = position;
  return line - position;
}

Plan plan_packed(const Pass& pass, bool exact, int processors) {
  Plan plan;
  std::array<int, kCudaMaxHeads> warm;
  for (std::size_t h = 0; h < pass.slope_H.size(); ++h)
    warm[h] = warm_chunks(static_cast<float>(pass.slope_H[h]));
  const auto cu = pass.packing.cu_seqlens;
  const int heads = static_cast<int>(pass.slope_H.size());
  int line = 0, units = 0;
  for (std::size_t i = 1; i < cu.size(); ++i) {
    line += heads * chunks_of(cu[i] - cu[i - 1]);
    units += cu[i] > cu[i - 1] ? heads : 0;
  }
  plan.ranges = processors;
  const double share = (line + kSegment * units) / processors;
  for (double budget = share + 1;;) {
    const int left = cut_packed_line(cu, line, processors, budget,
                                     {warm.data(), pass.slope_H.size()}, exact, plan.cut.data());
    if (left == 0) return plan;
    budget += std::max(static_cast<double>(left) / processors, 0.001 * share + 1);
  }
}

}  // namespace

Plan make_plan(const Pass& pass, int processors) {
  // A block may reach its end before another has read where it starts.
  const bool in_place = pass.in.data != nullptr && pass.in.data == pass.out.data;
  if (!pass.packing.cu_seqlens.empty())
    return plan_packed(pass, pass.exact || in_place, processors);
  const auto [B, T, H, K] = pass.sizes_BTHK;
  return in_place ? Plan{} : plan_rows(pass, chunks_of(T), static_cast<int>(B * H), processors);
}

}  // namespace everlong::lightning::engine
