#include "data/byte_pairs.h"

#include <bit>
#include <limits>
#include <queue>

namespace everlong {
namespace {

constexpr std::uint64_t kFree = ~std::uint64_t{0};
constexpr std::size_t kShort = 48;  // bytes; looking at all pairs each time is quicker up to there

std::uint64_t key_of(std::int32_t left, std::int32_t right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}
std::size_t slot_of(std::uint64_t key, std::size_t slots) {
  return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15u) >> 20) & (slots - 1);
}

}  // namespace

Result<BytePairs> BytePairs::make(std::vector<std::string> bytes_of,
                                  const std::vector<Merge>& merges, bool whole_pieces) {
  BytePairs out;
  out.whole_pieces_ = whole_pieces;
  for (std::size_t id = 0; id < bytes_of.size(); ++id)
    if (!bytes_of[id].empty() &&
        !out.by_bytes_.emplace(bytes_of[id], static_cast<std::int32_t>(id)).second)
      return invalid_argument("two tokens are the same bytes: ids ",
                              out.by_bytes_.find(bytes_of[id])->second, " and ", id);
  for (int byte = 0; byte < 256; ++byte) {
    const auto found = out.by_bytes_.find(std::string(1, static_cast<char>(byte)));
    if (found == out.by_bytes_.end())
      return invalid_argument("byte ", byte,
                              " is no token; all 256 must be, so that any text has ids");
    out.of_byte_[byte] = found->second;
  }
  out.keys_.assign(std::bit_ceil(2 * merges.size() + 2), kFree);
  out.values_.resize(out.keys_.size());
  out.bytes_of_ = std::move(bytes_of);
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    if (out.bytes_of(merge.left).empty() || out.bytes_of(merge.right).empty() ||
        out.bytes_of(merge.merged) != cat(out.bytes_of(merge.left), out.bytes_of(merge.right)))
      return invalid_argument("merge ", rank, " (ids ", merge.left, " and ", merge.right, " to ",
                              merge.merged, ") does not join two tokens into a third");
    const std::uint64_t key = key_of(merge.left, merge.right);
    std::size_t slot = slot_of(key, out.keys_.size());
    while (out.keys_[slot] != kFree && out.keys_[slot] != key)
      slot = (slot + 1) & (out.keys_.size() - 1);
    // A pair that is listed twice has the later rank, as in the tokenizers package.
    out.keys_[slot] = key;
    out.values_[slot] = {static_cast<std::int32_t>(rank), merge.merged};
  }
  return out;
}

const BytePairs::Ranked* BytePairs::merge_of(std::int32_t left, std::int32_t right) const {
  const std::uint64_t key = key_of(left, right);
  for (std::size_t slot = slot_of(key, keys_.size());; slot = (slot + 1) & (keys_.size() - 1)) {
    if (keys_[slot] == key) return &values_[slot];
    if (keys_[slot] == kFree) return nullptr;
  }
}

void BytePairs::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (piece.empty()) return;
  if (whole_pieces_)
    if (const auto found = by_bytes_.find(piece); found != by_bytes_.end()) {
      ids.push_back(found->second);
      return;
    }
  std::vector<std::int32_t> parts;
  parts.reserve(piece.size());
  for (const char byte : piece) parts.push_back(of_byte_[static_cast<unsigned char>(byte)]);
  if (parts.size() > kShort) {
    merge_long(parts);
  } else {
    merge_short(parts);
  }
  ids.insert(ids.end(), parts.begin(), parts.end());
}

void BytePairs::merge_short(std::vector<std::int32_t>& parts) const {
  while (parts.size() > 1) {
    const Ranked* best = nullptr;
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      const Ranked* const merge = merge_of(parts[i], parts[i + 1]);
      if (merge != nullptr && (best == nullptr || merge->rank < best->rank))
        best = merge, where = i;
    }
    if (best == nullptr) return;
    parts[where] = best->merged;
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
}

// The same order of merges from a queue: lowest rank first, then leftmost.
void BytePairs::merge_long(std::vector<std::int32_t>& parts) const {
  constexpr std::size_t kEnd = std::numeric_limits<std::size_t>::max();
  struct Candidate {
    std::int32_t rank;
    std::size_t at;
    std::int32_t left, right, merged;  // stale once the parts at `at` are others
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  std::vector<std::size_t> next(parts.size()), before(parts.size());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    next[i] = i + 1 < parts.size() ? i + 1 : kEnd;
    before[i] = i > 0 ? i - 1 : kEnd;
  }
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::size_t at) {
    if (at == kEnd || next[at] == kEnd) return;
    if (const Ranked* const merge = merge_of(parts[at], parts[next[at]]))
      queue.push({merge->rank, at, parts[at], parts[next[at]], merge->merged});
  };
  for (std::size_t i = 0; i < parts.size(); ++i) offer(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const std::size_t right = parts[top.at] == top.left ? next[top.at] : kEnd;
    if (right == kEnd || parts[right] != top.right) continue;
    parts[top.at] = top.merged;
    parts[right] = -1;
    next[top.at] = next[right];
    if (next[right] != kEnd) before[next[right]] = top.at;
    next[right] = kEnd;
    offer(top.at);
    offer(before[top.at]);
  }
  std::erase(parts, -1);
}

}  // namespace everlong
