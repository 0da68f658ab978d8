#include "mechanisms/lightning/op_plan.h"

#include <algorithm>
#include <numeric>

namespace everlong::lightning {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan plan_rows(std::int64_t rows, std::int64_t tokens, const PlanLimits& limits) {
  Plan plan;
  plan.rows = rows;
  const std::int64_t head = tokens % limits.chunk, chunks = tokens / limits.chunk;
  const std::int64_t ranks =
      std::min(chunks, std::clamp<std::int64_t>(limits.tokens / limits.chunk, 1, limits.group));
  const std::int64_t tokens_of_row = std::max(ranks * limits.chunk, head);
  const std::int64_t batch =
      std::clamp<std::int64_t>(limits.tokens / std::max<std::int64_t>(tokens_of_row, 1), 1, rows);
  for (std::int64_t row = 0; row < rows; row += batch) {
    const std::int64_t count = std::min(batch, rows - row);
    if (head > 0) plan.blocks.push_back({row, count, 1, head, 0, {}});
    for (std::int64_t rank = 0; rank < chunks; rank += ranks)
      plan.blocks.push_back({row,
                             count,
                             std::min(ranks, chunks - rank),
                             limits.chunk,
                             head + rank * limits.chunk,
                             {}});
    plan.batches.push_back(static_cast<std::int64_t>(plan.blocks.size()));
  }
  return plan;
}

Plan plan_packed(std::span<const std::int64_t> cu_seqlens, const PlanLimits& limits) {
  const std::int64_t n = limits.chunk, padding = cu_seqlens.back();
  const auto begin = [&](std::int64_t sequence) {
    return cu_seqlens[static_cast<std::size_t>(sequence)];
  };
  const auto length = [&](std::int64_t sequence) { return begin(sequence + 1) - begin(sequence); };
  Plan plan;
  for (std::int64_t s = 0; s + 1 < static_cast<std::int64_t>(cu_seqlens.size()); ++s)
    if (length(s) > 0) plan.order.push_back(s);
  plan.rows = static_cast<std::int64_t>(plan.order.size());
  // Longest first: the rows that still have a chunk at some rank are then always the first ones of
  // a batch.
  std::ranges::stable_sort(plan.order, [&](auto a, auto b) { return length(a) > length(b); });
  const auto sequence = [&](std::int64_t row) { return plan.order[static_cast<std::size_t>(row)]; };
  const auto chunks = [&](std::int64_t row) { return ceil_div(length(sequence(row)), n); };
  const auto add = [&](Block block) {
    block.first = static_cast<std::int64_t>(plan.slot_token.size());
    plan.blocks.push_back(std::move(block));
  };

  for (std::int64_t row = 0; row < plan.rows;) {
    const std::int64_t size = std::min(length(sequence(row)), n);
    const std::int64_t rows = std::clamp<std::int64_t>(limits.tokens / size, 1, plan.rows - row);
    Block head{.row = row, .rows = rows, .ranks = 1};
    for (std::int64_t i = row; i < row + rows; ++i) {
      head.length.push_back((length(sequence(i)) - 1) % n + 1);
      head.chunk = std::max(head.chunk, head.length.back());
    }
    add(head);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t m = head.length[static_cast<std::size_t>(i)],
                         from = begin(sequence(row + i));
      plan.slot_token.insert(plan.slot_token.end(), static_cast<std::size_t>(head.chunk - m),
                             padding);
      for (std::int64_t t = 0; t < m; ++t) plan.slot_token.push_back(from + t);
    }
    std::int64_t active = rows;
    for (std::int64_t rank = 1; rank < chunks(row);) {
      while (chunks(row + active - 1) <= rank) --active;
      const std::int64_t wanted =
          std::clamp<std::int64_t>(limits.tokens / (active * n), 1, limits.group);
      const std::int64_t ranks = std::min(wanted, chunks(row + active - 1) - rank);
      add({.row = row, .rows = active, .ranks = ranks, .chunk = n});
      for (std::int64_t i = 0; i < active; ++i) {
        const std::int64_t end = begin(sequence(row + i) + 1);
        const std::int64_t from = end - (chunks(row + i) - rank) * n;
        for (std::int64_t t = 0; t < ranks * n; ++t) plan.slot_token.push_back(from + t);
      }
      rank += ranks;
    }
    plan.batches.push_back(static_cast<std::int64_t>(plan.blocks.size()));
    row += rows;
  }
  return plan;
}

}  // namespace everlong::lightning
