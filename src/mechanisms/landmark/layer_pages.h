// What Landmark Attention carries, in tiers: landmark keys in memory, complete blocks in pages
// under a byte budget and in a file, the incomplete block beside them. For streams longer than
// memory; without gradients, fp32 and bf16. On a GPU landmark keys and the incomplete block lie
// there, with copies of the pages that are read most.
#pragma once
#include "layers/tiered_state.h"
#include "mechanisms/landmark/layer_memory.h"
#include "mechanisms/landmark/layer_pages_device.h"
#include "mechanisms/landmark/layer_pages_group.h"

namespace everlong::landmark {

// Complete blocks that a stream keeps so that every token finds its past; 0: all.
inline std::int64_t kept_blocks(const Retrieval& r) {
  return r.max_blocks > 0 ? r.max_blocks + r.window + 1 : 0;
}

// The same numbers as BlockMemory up to rounding, for any cut of the text. Sequences, and the
// states that select() makes, share one store; forks share pages.
class PagedMemory final : public TieredState {
 public:
  // device_bytes: of copies of pages in the memory of the options' device; 0 only on the CPU, which
  // reads pages where they lie. Refuses what PageStore::open refuses, other dtypes, blocks scored
  // without landmarks, top_k < 1 (0 would read every page for every token), and device_bytes that
  // do not hold what one token of all key heads reads.
  static Result<std::unique_ptr<PagedMemory>> create(std::int64_t sequences,
                                                     const MemoryShape& shape,
                                                     const at::TensorOptions& options,
                                                     const StoreOptions& tiers,
                                                     std::int64_t device_bytes = 0);

  // BlockMemory's tensors, made from the pages: as large as everything that is kept. Blocks that
  // are never read again and the values of landmarks are zeros. A page that the file lost throws.
  TensorMap tensors() const override;
  Status restore(const TensorMap& tensors) override;
  std::unique_ptr<State> select(std::span<const std::int64_t> sequences) const override;
  // The store, landmark keys and incomplete blocks, each at its most. The store is shared by forks:
  // where they had it hold more pages than these sequences can have, as many as that.
  std::int64_t bytes_bound(std::int64_t tokens) const override;
  // The same, now. While restored tensors wait for their positions: of those.
  std::int64_t memory_bytes() const override;
  // Of the store, which forks share: each of them answers the whole.
  std::int64_t file_bytes() const override { return store_->file_bytes(); }
  std::int64_t file_bytes_bound(std::int64_t tokens) const override;
  // page_hits, page_misses, pages_spilled (of the store); on a GPU device_hits and device_misses
  // (of the copies there); and where set_certify asked: queries, queries_certified (bound within
  // epsilon), unread_share (summed), blocks_more (read beyond top_k).
  std::map<std::string, double> counts() const override;

  // As BlockMemory::attend. A failure of the store (a full disk, a damaged page) throws what it
  // says; the state then refuses everything but restore.
  Read attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK, const at::Tensor& v_BTGV,
              const Sequences& sequences, const Reader& reader, bool want_picks);

  // From now on reads more blocks than top_k, up to at_most more, until what the unread ones could
  // change is at most epsilon (2-norm of a head's output; kernel_certificate.h and read_certified
  // say what is compared). Costs a pass over all scores for each token and head, on the CPU.
  using Certify = landmark::Certify;
  void set_certify(std::optional<Certify> certify) { certify_ = certify; }
  // Of the last attend, when asked for: [B, T, H] each.
  struct Certificates {
    at::Tensor bound;         // fp64; 0 where everything was read
    at::Tensor unread_share;  // fp64: softmax weight of what was not read
    at::Tensor more;          // int64: blocks read beyond the picks
  };
  const Certificates& certificates() const { return certificates_; }

  // Saves into a folder, one state file a sequence, pages staying in the store's file; and takes
  // it back. BlockPages::save says what survives what.
  Status save_pages(const fs::path& folder);
  Status restore_pages(const fs::path& folder);

  const PageStore& store() const { return *store_; }

 private:
  struct Line {  // one sequence
    BlockPages pages;
    // Rows of positions [tail_first, position): the incomplete block and the window before it.
    at::Tensor k, v;  // [G, rows, K], [G, rows, V]
    std::int64_t tail_first = 0;
    DeviceLandmarks landmarks = {};  // with a pool
    // Of each key head, what the last token picked.
    std::vector<std::vector<Pick>> last_picks = {};
  };
  PagedMemory(std::int64_t sequences, const MemoryShape& shape, const at::TensorOptions& options,
              std::shared_ptr<PageStore> store, const StoreOptions& tiers,
              std::int64_t device_bytes);
  Line fresh_line() const;
  void settle() const;  // builds the lines that restore() left as tensors
  Line line_of(const at::Tensor& k, const at::Tensor& v, std::int64_t position) const;
  // [1, T, ..] of one sequence.
  struct LineRead {
    at::Tensor out, selected;
    Certificates certificates;
  };
  LineRead attend_line(std::int64_t number, const at::Tensor& q, const at::Tensor& k,
                       const at::Tensor& v, const Reader& reader);
  void close_blocks(Line& line, std::int64_t end) const;
  std::vector<std::vector<Pick>> picks_of_last(const at::Tensor& selected) const;
  void copy_landmarks(Line& line) const;  // of all its pages to the device
  void count(const Certificates& certificates);
  std::int64_t most_pages(std::int64_t blocks) const;  // of sequences with so many complete blocks

  MemoryShape shape_;
  at::TensorOptions options_;
  std::shared_ptr<PageStore> store_;
  StoreOptions tiers_;
  std::int64_t device_bytes_ = 0;
  std::unique_ptr<DevicePool>
      pool_;  // of the lines' pages; none where pages are read where they lie
  TurnTables tables_;
  mutable std::vector<Line> lines_;
  mutable TensorMap given_;  // by restore(), until the positions are known
  std::string broken_;       // why this state cannot go on
  std::optional<Certify> certify_;
  Certificates certificates_;
  struct Certain {  // since this state was made
    double queries = 0, within = 0, unread_share = 0, more = 0;
  } certain_;
};

// A layer's settings "pages" (a folder; "" is the plain memory), "page_megabytes" (of memory, for
// each layer of each stream) and "device_megabytes" (of a GPU's, likewise). Its states spill into
// temporary files there, which go with the process whatever ends it. "epsilon" and "epsilon_blocks"
// (0: any number): PagedMemory::Certify.
struct PageSettings {
  std::string folder;
  std::int64_t megabytes = 256, device_megabytes = 256;
  std::optional<double> epsilon;
  std::int64_t most_more = 0;
};
Status check_pages(const PageSettings& pages, const Retrieval& retrieval);
// Throws what PagedMemory::create refuses.
std::unique_ptr<State> make_paged_state(std::int64_t sequences, const MemoryShape& shape,
                                        const at::TensorOptions& options,
                                        const PageSettings& pages);

}  // namespace everlong::landmark
