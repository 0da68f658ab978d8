// Documents of tasks that small models can learn, with the targets that count: endless, a function
// of settings and number alone.
//
//   retrieval (data/retrieval_task.h): prompt, answer, end of document. The answer counts 1 in all,
//     the rest of the text `text_weight` in all; the answer's separators belong to the rest.
//   recall: blanks, one symbol at a random place, question marks at random places; every question
//     after the symbol is to be answered with it. One symbol of `symbols` is right by chance.
//   counts: symbols drawn independently with shares of the document's own, which come from a
//     Dirichlet law; every symbol is to be predicted. The best guess, known exactly, needs nothing
//     but how often each symbol came before.
#pragma once
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "data/dataset.h"
#include "data/landmarks.h"
#include "data/retrieval_task.h"

namespace everlong {

struct SyntheticDocument : LabelledText {
  double best_nats = 0;  // counts: -ln of what the best predictor gives the targets, summed
};

// Lengths of documents in tokens, all specials counted, uniform in [low, high]. `share`: of the
// tokens that have such lengths, relative to the other ranges.
struct LengthRange {
  std::int64_t low = 0, high = 0;
  double share = 1;
};
// "256", "52-121", "52-121:85,52-481:15"; counts take K and M.
Result<std::vector<LengthRange>> length_ranges(std::string_view text);

struct RecallTask {
  std::int64_t symbols = 8;          // 1 to 16
  std::int64_t first = 0, last = 0;  // the symbol's place; last = 0: anywhere in the document
  double questions = 0.125;          // share of the other places that ask
};

struct CountsTask {
  std::int64_t symbols = 16;   // 2 to 16
  double concentration = 0.3;  // of the symmetric Dirichlet law: small, and few symbols prevail
};

struct SyntheticSettings {
  std::string task = "passkey";  // a retrieval task's name, "recall" or "counts"
  RetrievalTask retrieval = {};
  RecallTask recall = {};
  CountsTask counts = {};
  FillerKind filler = FillerKind::kSentences;
  std::vector<LengthRange> lengths = {{52, 121, 1}};
  double text_weight = 0.2;
  // Retrieval tasks: memories store the filler of a document w times, w = exp(uniform in [0, ln
  // write_multiplicity]), one draw a document; everything else once. For a memory that is a sum and
  // filler that repeats, this is what a filler w times as long leaves behind. 1: no writes are
  // given. Documents are otherwise the same, whatever the multiplicity.
  double write_multiplicity = 1;
  // Landmark tokens after every block - 1 tokens; 0: none. Their id is the tokenizer's vocab_size;
  // nothing predicts them and they predict nothing. Lengths count them; a document that would end
  // with one is a token shorter.
  std::int64_t landmark_block = 0;
  std::uint64_t seed = 1;
};

// Makes documents. Tokenizer and filler outlive it. Thread safe.
class SyntheticDocuments {
 public:
  static Result<SyntheticDocuments> make(const SyntheticSettings& settings,
                                         const Tokenizer& tokenizer, const Filler& filler);
  Result<SyntheticDocument> document(std::uint64_t number) const;
  std::int64_t vocab_size() const;  // the landmark counted

 private:
  SyntheticDocuments(const SyntheticSettings& settings, const Tokenizer& tokenizer)
      : settings_(settings), tokenizer_(&tokenizer) {}
  std::int64_t draw_length(Random& random) const;
  Status find_symbols(std::int64_t count);
  Result<SyntheticDocument> recall(std::int64_t tokens, Random& random) const;
  SyntheticDocument counts(std::int64_t tokens, Random& random) const;
  Result<SyntheticDocument> retrieval(std::int64_t tokens, Random& random) const;
  std::vector<float> drawn_writes(const RetrievalPrompt& prompt, std::int64_t tokens,
                                  std::uint64_t seed) const;
  SyntheticSettings settings_;
  const Tokenizer* tokenizer_;
  std::vector<RetrievalPrompts> prompts_;  // one, for a retrieval task
  std::vector<std::int32_t> symbols_;
  std::int32_t blank_ = 0, question_ = 0;
};

struct SyntheticReport {
  std::int64_t documents = 0, tokens = 0;  // of both splits
  // counts: nats per target of the best predictor on the held-out documents; what a model loses
  // more is its own fault. None for other tasks.
  std::optional<double> best_valid_loss;
  DatasetInfo dataset;
};

struct SyntheticAmount {
  std::int64_t train_tokens = 1 << 20;
  std::int64_t valid_documents = 100;
  std::int64_t shard_tokens = std::int64_t{1} << 24;
  bool force = false;  // write into a folder that holds other things
};

// Writes the dataset folder `out` with targets. Held-out documents have numbers of their own. Holds
// one shard of each split in memory. Draws progress on stderr.
Result<SyntheticReport> write_synthetic(const SyntheticDocuments& documents,
                                        const Tokenizer& tokenizer, const SyntheticAmount& amount,
                                        const fs::path& out);
nlohmann::json to_json(const SyntheticReport& report);

}  // namespace everlong
