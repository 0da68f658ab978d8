// Byte pair encoding: pieces of text to ids, by merging neighbours in a fixed order.
// Sennrich et al., 1508.07909; over bytes as in GPT-2.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/status.h"

namespace everlong {

// Immutable and thread safe.
class BytePairs {
 public:
  struct Merge {
    std::int32_t left = 0, right = 0, merged = 0;  // ids; earlier merges come first
  };
  // bytes_of[id]: the bytes of the token, empty where the id is none. All 256 single bytes must be
  // tokens. whole_pieces: a piece that is itself a token is not merged together (tokenizer.json
  // calls it ignore_merges).
  static Result<BytePairs> make(std::vector<std::string> bytes_of, const std::vector<Merge>& merges,
                                bool whole_pieces);

  // Appends the ids of one piece. Time n log n in its length.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const;
  // Empty for an id that is no token.
  std::string_view bytes_of(std::int32_t id) const {
    return id >= 0 && static_cast<std::size_t>(id) < bytes_of_.size()
               ? std::string_view(bytes_of_[static_cast<std::size_t>(id)])
               : std::string_view();
  }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_of_.size()); }

 private:
  struct Ranked {
    std::int32_t rank = 0, merged = 0;
  };
  struct Text {
    using is_transparent = void;  // NOLINT: the name that std::unordered_map looks for
    std::size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>()(text);
    }
  };
  const Ranked* merge_of(std::int32_t left, std::int32_t right) const;
  void merge_short(std::vector<std::int32_t>& parts) const;
  void merge_long(std::vector<std::int32_t>& parts) const;

  std::vector<std::string> bytes_of_;
  std::int32_t of_byte_[256] = {};
  bool whole_pieces_ = false;
  std::unordered_map<std::string, std::int32_t, Text, std::equal_to<>> by_bytes_;
  // Open addressing: keys are left << 32 | right, ~0 is free.
  std::vector<std::uint64_t> keys_;
  std::vector<Ranked> values_;
};

}  // namespace everlong
