#include "mechanisms/landmark/kernel_pages_read.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "kernels/cpu/softmax_block.h"

namespace everlong::landmark {
namespace {

// One query's visit to one block.
struct Visit {
  std::int64_t block = 0, query = 0, pick = 0;
  std::int64_t place = 0;  // in blocks from the start of the frame
  double mass = 0;         // about its gate
};

struct AlignedDelete {
  void operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<std::byte, AlignedDelete>;

Scratch make_scratch(std::int64_t bytes) {
  return Scratch(static_cast<std::byte*>(
      ::operator new[](static_cast<std::size_t>(bytes), std::align_val_t{64})));
}

// The visits of all queries, block by block.
std::vector<Visit> visits_of(const Frame& frame, std::span<const std::vector<Pick>> picks,
                             const float* near_lse_n) {
  std::vector<Visit> visits;
  for (std::size_t i = 0; i < picks.size(); ++i) {
    double top = near_lse_n[i];
    for (const Pick& pick : picks[i]) top = std::max<double>(top, pick.score);
    double sum = std::exp(near_lse_n[i] - top);
    for (const Pick& pick : picks[i]) sum += std::exp(pick.score - top);
    for (std::int64_t t = 0; t < std::ssize(picks[i]); ++t) {
      const Pick& pick = picks[i][static_cast<std::size_t>(t)];
      visits.push_back({pick.block, static_cast<std::int64_t>(i), t, frame.place(pick.block, t),
                        std::exp(pick.score - top) / sum});
    }
  }
  std::ranges::stable_sort(visits, {}, &Visit::block);
  return visits;
}

class PageReader {
 public:
  PageReader(const BlockPages& pages, const PageQueries& queries)
      : pages_(pages),
        shape_(pages.shape()),
        queries_(queries),
        scratch_(make_scratch(
            cpu::SoftmaxForward::scratch_bytes(dim(shape_.key_dim), dim(shape_.value_dim)))),
        tile_({dim(shape_.key_dim), dim(shape_.value_dim), static_cast<float>(queries.scale)},
              scratch_.get()),
        q_(static_cast<std::size_t>(cpu::kTileRows * shape_.key_dim)),
        o_(static_cast<std::size_t>(cpu::kTileRows * shape_.value_dim)),
        landmark_(static_cast<std::size_t>(shape_.key_dim)),
        begin_(cpu::kTileRows, 0),
        end_(cpu::kTileRows, shape_.tokens()) {}

  // Visits of one block: take(visit, attention within the block [V], its score at its place).
  template <class Take>
  Status read(std::span<const Visit> visits, const Take& take) {
    double mass = 0;
    for (const Visit& visit : visits) mass = std::max(mass, visit.mass);
    const std::int64_t block = visits.front().block;
    EVERLONG_ASSIGN(const PinnedPage page, pages_.read(block, queries_.head, mass));
    EVERLONG_RETURN_IF_ERROR(pages_.landmark(block, queries_.head, landmark_));
    while (!visits.empty()) {
      const std::size_t rows = std::min<std::size_t>(visits.size(), cpu::kTileRows);
      read_tile(page.bytes(), visits.first(rows), take);
      visits = visits.subspan(rows);
    }
    return {};
  }

 private:
  static int dim(std::int64_t x) { return static_cast<int>(x); }

  template <class Take>
  void read_tile(std::span<const std::byte> page, std::span<const Visit> visits, const Take& take) {
    const std::int64_t K = shape_.key_dim, V = shape_.value_dim;
    float gates[cpu::kTileRows];
    for (std::size_t r = 0; r < visits.size(); ++r) {
      const float* q = queries_.q_SnK + (visits[r].place * queries_.count + visits[r].query) * K;
      std::copy_n(q, K, q_.begin() + static_cast<std::ptrdiff_t>(r) * K);
      float sum = 0;
      for (std::int64_t i = 0; i < K; ++i) sum += q[i] * landmark_[static_cast<std::size_t>(i)];
      gates[r] = sum * static_cast<float>(queries_.scale);
    }
    tile_.begin({q_.data(), DType::kFloat32, K, 0, 1}, static_cast<int>(visits.size()));
    tile_.absorb({{page.data(), shape_.dtype, K, 0, 1},
                  {page.data() + shape_.key_bytes(), shape_.dtype, V, 0, 1},
                  shape_.tokens(),
                  nullptr},
                 {begin_.data(), end_.data()});
    tile_.finish({o_.data(), DType::kFloat32, V, 0, 1}, {});
    for (std::size_t r = 0; r < visits.size(); ++r)
      take(visits[r], o_.data() + static_cast<std::ptrdiff_t>(r) * V, gates[r]);
  }

  const BlockPages& pages_;
  const PageShape& shape_;
  const PageQueries& queries_;
  Scratch scratch_;
  cpu::SoftmaxForward tile_;
  std::vector<float> q_, o_, landmark_;
  std::vector<std::int64_t> begin_, end_;
};

}  // namespace

Status pick_blocks(const BlockPages& pages, const PageQueries& queries,
                   std::vector<std::vector<Pick>>& picks) {
  const Frame& f = queries.frame;
  const std::int64_t row = queries.count * pages.shape().key_dim;
  return pages.search(queries.head, scans_of(f, queries.q_SnK, row), queries.count, queries.scale,
                      f.picks, picks);
}

Status read_picked(const BlockPages& pages, const PageQueries& queries,
                   std::span<const std::vector<Pick>> picks, const float* near_lse_n,
                   float* out_nPV, float* gates_nP) {
  const PageShape& s = pages.shape();
  if (s.key_dim > cpu::kMostDim || s.value_dim > cpu::kMostDim)
    return unsupported("landmark pages: keys of ", s.key_dim, " and values of ", s.value_dim,
                       "; up to ", cpu::kMostDim, " are read");
  const std::vector<Visit> visits = visits_of(queries.frame, picks, near_lse_n);
  const auto take = [&](const Visit& visit, const float* o, float gate) {
    const std::int64_t at = visit.query * queries.frame.picks + visit.pick;
    std::copy_n(o, s.value_dim, out_nPV + at * s.value_dim);
    gates_nP[at] = gate;
  };
  PageReader reader(pages, queries);
  for (std::size_t next = 0; next < visits.size();) {
    std::size_t end = next + 1;
    while (end < visits.size() && visits[end].block == visits[next].block) ++end;
    EVERLONG_RETURN_IF_ERROR(reader.read(std::span(visits).subspan(next, end - next), take));
    next = end;
  }
  return {};
}

Status read_certified(const BlockPages& pages, const PageQueries& queries,
                      std::span<const std::vector<Pick>> picks, double epsilon,
                      std::int64_t at_most, float* out_nV, float* lse_n,
                      std::span<Certified> certified) {
  const Frame& f = queries.frame;
  const PageShape& s = pages.shape();
  const std::int64_t count = f.count(), recent = f.first_local - f.picks;
  std::vector<float> all_norms(static_cast<std::size_t>(count)), scores(all_norms), norms, unread;
  for (std::int64_t b = 0; b < count; ++b) {
    EVERLONG_ASSIGN(all_norms[static_cast<std::size_t>(b)],
                    pages.value_norm(f.oldest + b, queries.head));
  }
  PageReader reader(pages, queries);
  std::vector<std::int64_t> blocks;
  for (std::int64_t i = 0; i < queries.count; ++i) {
    const auto score = [&](std::int64_t begin, std::int64_t end) {
      const float* q = queries.q_SnK + (f.slot(begin) * queries.count + i) * s.key_dim;
      return pages.scores(queries.head, {q, begin, end}, queries.scale,
                          std::span(scores).subspan(static_cast<std::size_t>(begin - f.oldest),
                                                    static_cast<std::size_t>(end - begin)));
    };
    if (recent > f.oldest) EVERLONG_RETURN_IF_ERROR(score(f.oldest, recent));
    for (std::int64_t b = recent; b < f.first_local; ++b) EVERLONG_RETURN_IF_ERROR(score(b, b + 1));
    blocks.clear(), unread.clear(), norms.clear();
    auto pick = picks[static_cast<std::size_t>(i)].begin();
    for (std::int64_t b = 0; b < count; ++b) {
      if (pick != picks[static_cast<std::size_t>(i)].end() && pick->block == f.oldest + b) {
        ++pick;
        continue;
      }
      blocks.push_back(b);
      unread.push_back(scores[static_cast<std::size_t>(b)]);
      norms.push_back(all_norms[static_cast<std::size_t>(b)]);
    }
    float* out = out_nV + i * s.value_dim;
    const auto norm_of_out = [&] {
      double sum = 0;
      for (std::int64_t c = 0; c < s.value_dim; ++c) sum += double{out[c]} * out[c];
      return std::sqrt(sum);
    };
    // What was read already counts as local: the output stays a mean of it and the values to come.
    const BlockChoice choice =
        choose_blocks(unread, norms, lse_n[i], norm_of_out(),
                      {.epsilon = epsilon, .at_least = 0, .at_most = at_most}, Unread::kLeftOut);
    const auto take = [&](const Visit&, const float* o, float gate) {
      const double top = std::max(gate, lse_n[i]);
      const double sum = std::exp(gate - top) + std::exp(lse_n[i] - top);
      const double weight = std::exp(gate - top) / sum;
      for (std::int64_t c = 0; c < s.value_dim; ++c)
        out[c] = static_cast<float>(out[c] + weight * (o[c] - out[c]));
      lse_n[i] = static_cast<float>(top + std::log(sum));
    };
    UnreadBlocks rest;
    auto more = choice.blocks.begin();
    for (std::int64_t u = 0; u < std::ssize(blocks); ++u) {
      const auto at = static_cast<std::size_t>(u);
      if (more == choice.blocks.end() || *more != u) {
        rest.add(unread[at], norms[at]);
        continue;
      }
      ++more;
      const std::int64_t block = f.oldest + blocks[at];
      const Visit visit{block, i, 0, f.slot(block), std::exp(double{unread[at]} - lse_n[i])};
      EVERLONG_RETURN_IF_ERROR(reader.read({&visit, 1}, take));
    }
    certified[static_cast<std::size_t>(i)] = {
        rest.certify(lse_n[i], norm_of_out(), Unread::kLeftOut), std::ssize(choice.blocks)};
  }
  return {};
}

}  // namespace everlong::landmark
