// What a model of text has to beat: byte models of order 0 and k, and a general compressor. Bits
// per byte, held out.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "data/dataset.h"
#include "data/tokenizer.h"

namespace everlong {

// Open-addressing map from packed n-grams to counts: 12 bytes a slot, at most 2/3 full. Absent keys
// count 0.
class GramCounts {
 public:
  GramCounts() { rehash(1 << 10); }
  std::uint32_t& operator[](std::uint64_t gram);
  std::uint32_t find(std::uint64_t gram) const;
  std::size_t size() const { return size_; }
  template <class Visitor>
  void visit(const Visitor& visitor) const {
    for (std::size_t i = 0; i < keys_.size(); ++i)
      if (keys_[i] != kEmpty) visitor(keys_[i], counts_[i]);
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};  // grams use at most 54 bits
  std::size_t slot(std::uint64_t gram) const;
  void rehash(std::size_t slots);
  std::vector<std::uint64_t> keys_;
  std::vector<std::uint32_t> counts_;
  std::size_t size_ = 0;
};

// Interpolated Kneser-Ney with three discounts (Chen and Goodman 1999, section 3): the strongest of
// the classical smoothings. Symbols are the bytes and the end of the document; before a document's
// first byte the context is all "beginning". Order 0 is the plain frequency of bytes. Thread safe
// to read.
class ByteModel {
 public:
  static constexpr int kMostOrder = 5;
  static constexpr int kEnd = 256;        // symbol: end of document
  static constexpr int kBeginning = 256;  // in a context
  static constexpr int kSymbols = 257;

  // P(symbol | context), over kSymbols symbols. The last `order` symbols of the context count;
  // where it is shorter it is preceded by the beginning of the document. Positive, sums to 1.
  double probability(std::string_view context, int symbol) const;
  // -log2 P of every byte but the first, given the bytes before it, and of the end of the document
  // when `ends`.
  double bits(std::string_view document, bool ends = true) const;
  int order() const { return static_cast<int>(levels_.size()) - 1; }

 private:
  friend class ByteModelTrainer;
  struct Context {
    double total = 0;                            // of the counts after it
    std::uint32_t ones = 0, twos = 0, more = 0;  // symbols counted once, twice, more often after it
  };
  struct Level {
    GramCounts grams;     // context and symbol -> count
    GramCounts contexts;  // context -> 1 + its place in `stats`
    std::vector<Context> stats;
    double discount[4] = {0, 0, 0, 0};  // by min(count, 3)
  };
  double probability(std::uint64_t packed_context, int symbol) const;
  std::vector<Level> levels_;  // by order
};

class ByteModelTrainer {
 public:
  // 0 <= order <= ByteModel::kMostOrder.
  explicit ByteModelTrainer(int order);
  void add(std::string_view document);
  ByteModel finish() &&;

 private:
  int order_;
  GramCounts grams_;
};

struct ByteBaseline {
  std::string name;  // "order-0 bytes", "order-3 bytes", "xz -9"
  double bits_per_byte = 0;
};
struct ByteBaselineReport {
  std::int64_t train_bytes = 0, held_out_bytes = 0, held_out_documents = 0;
  std::vector<ByteBaseline> baselines;
  std::string missing;  // why there is no figure for xz; empty when there is one
};
nlohmann::json to_json(const ByteBaselineReport& report);

struct ByteBaselineOptions {
  std::vector<int> orders = {0, 3};
  bool xz = true;
  std::int64_t held_out_tokens = 0;  // only so many from the beginning; 0: all
};

// Byte models learn from `train` and are scored on `held_out` on what a model is scored on: every
// token but the first of each document, its end included; divided by the bytes of text. xz
// compresses the held-out text as one file, having seen nothing else. Documents are decoded to
// bytes first, so the figures are comparable whatever the tokenizer.
Result<ByteBaselineReport> byte_baselines(const SplitView& train, const SplitView& held_out,
                                          const Tokenizer& tokenizer,
                                          const ByteBaselineOptions& options = {});

// Size of what `xz -9 -c` makes of the text. kNotFound when there is no xz.
Result<std::int64_t> xz_bytes(std::string_view text);

}  // namespace everlong
