// What queries take from the blocks they picked, read page by page where the pages lie: nothing is
// gathered, and a page that several queries picked is visited once.
#pragma once
#include "mechanisms/landmark/kernel_certificate.h"
#include "mechanisms/landmark/kernel_pages.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

// The n queries of one key/value head that share a frame (params.h). q_SnK [picks + 1, n, K], fp32:
// row s holds the queries as a block sees them that is read (or scored) s blocks into the frame.
struct PageQueries {
  Frame frame;
  std::int64_t head = 0, count = 0;  // key/value head; n
  const float* q_SnK = nullptr;
  double scale = 1;
};

// The picks of each query, rising, by their own scores: per token and head. Blocks [frame.oldest,
// frame.first_local) must be kept.
Status pick_blocks(const BlockPages& pages, const PageQueries& queries,
                   std::vector<std::vector<Pick>>& picks);

// out_nPV[i, t]: attention of query i within its t-th pick; gates_nP[i, t]: the pick's score at the
// place it is read at. Each query has frame.picks picks, rising; their scores and near_lse_n (log
// of the local sum) only tell how much the pages weigh in the store. Dims up to 256. Allocates
// what it needs; thread safe for distinct outputs.
Status read_picked(const BlockPages& pages, const PageQueries& queries,
                   std::span<const std::vector<Pick>> picks, const float* near_lse_n,
                   float* out_nPV, float* gates_nP);

struct Certified {
  Certificate certificate;  // of what was read in the end, Unread::kLeftOut
  std::int64_t more = 0;    // blocks read beyond the picks
};

// Reads more blocks for each query until the bound on what the unread ones could change
// (kernel_certificate.h) is at most epsilon, or `at_most` more are read. What is compared with is
// attention over the picks where they are, and every other kept block at the slot it is scored at;
// so that is where blocks beyond the picks are read. out_nV and lse_n: the attention over local
// tokens and picks, and log of its sum; they take in what is read more.
Status read_certified(const BlockPages& pages, const PageQueries& queries,
                      std::span<const std::vector<Pick>> picks, double epsilon,
                      std::int64_t at_most, float* out_nV, float* lse_n,
                      std::span<Certified> certified);

}  // namespace everlong::landmark
