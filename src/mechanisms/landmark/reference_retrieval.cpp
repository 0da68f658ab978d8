#include "mechanisms/landmark/reference_retrieval.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace everlong::landmark::reference {
namespace {

// x turned to a position.
std::vector<double> turned(const Stream& s, const double* x, std::int64_t position) {
  std::vector<double> out(x, x + s.key_dim);
  const std::int64_t half = s.key_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const double angle =
        static_cast<double>(position) *
        std::pow(s.rope_base, -2.0 * static_cast<double>(i) / static_cast<double>(s.key_dim));
    const std::int64_t a = s.interleaved ? 2 * i : i, b = s.interleaved ? 2 * i + 1 : i + half;
    out[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
    out[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
  }
  return out;
}

double product(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

const double* query(const Stream& s, std::int64_t t, std::int64_t h) {
  return s.q.data() + (t * s.heads + h) * s.key_dim;
}
const double* key(const Stream& s, std::int64_t t, std::int64_t h) {
  return s.k.data() + (t * s.kv_heads + h / (s.heads / s.kv_heads)) * s.key_dim;
}
const double* value(const Stream& s, std::int64_t t, std::int64_t h) {
  return s.v.data() + (t * s.kv_heads + h / (s.heads / s.kv_heads)) * s.value_dim;
}

// The score that token and head give to a block whose first token is read at `base`.
double block_score(const Stream& s, const std::vector<double>& q, std::int64_t block,
                   std::int64_t base, std::int64_t h) {
  const std::int64_t L = s.retrieval.block;
  std::vector<double> of_tokens;
  for (std::int64_t o = 0; o < L; ++o)
    of_tokens.push_back(s.scale * product(q, turned(s, key(s, block * L + o, h), base + o)));
  switch (s.retrieval.score) {
    case BlockScore::kLandmark:
      break;
    case BlockScore::kMean:
      return std::accumulate(of_tokens.begin(), of_tokens.end(), 0.0) / static_cast<double>(L);
    case BlockScore::kMax:
      return *std::max_element(of_tokens.begin(), of_tokens.end());
  }
  return of_tokens.back();
}

// The score that token and head give to every kept block.
std::vector<double> block_scores(const Stream& s, const Frame& f, std::int64_t t, std::int64_t h) {
  std::vector<double> scores;
  const auto q = turned(s, query(s, t, h), t - f.shift());
  for (std::int64_t b = f.oldest; b < f.first_local; ++b)
    scores.push_back(block_score(s, q, b, f.slot(b) * f.block, h));
  return scores;
}

// log softmax: compared between tokens or heads.
void normalise(std::vector<double>& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double x : scores) sum += std::exp(x - top);
  for (double& x : scores) x -= top + std::log(sum);
}

void keep_larger(std::vector<double>& best, const std::vector<double>& scores) {
  if (best.empty()) best.assign(scores.size(), -std::numeric_limits<double>::infinity());
  for (std::size_t i = 0; i < scores.size(); ++i) best[i] = std::max(best[i], scores[i]);
}

// What decides for a token and head.
std::vector<double> deciding_scores(const Stream& s, const Frame& f, const Group& group,
                                    std::int64_t t, std::int64_t h) {
  if (s.retrieval.granularity == Granularity::kTokenHead) return block_scores(s, f, t, h);
  std::vector<double> best;
  const bool over_tokens = s.retrieval.granularity == Granularity::kHeadMaxOverTokens;
  const std::int64_t first = over_tokens ? group.begin : 0,
                     last = over_tokens ? group.end : s.heads;
  for (std::int64_t i = first; i < last; ++i) {
    auto scores = over_tokens ? block_scores(s, f, i, h) : block_scores(s, f, t, i);
    normalise(scores);
    keep_larger(best, scores);
  }
  return best;
}

std::vector<std::int64_t> pick(const Frame& f, const std::vector<double>& scores) {
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(f.count()));
  std::iota(blocks.begin(), blocks.end(), f.oldest);
  const auto level = [&](std::int64_t b) {
    return std::nearbyint(scores[static_cast<std::size_t>(b - f.oldest)] / kScoreGrid64);
  };
  std::ranges::sort(blocks, [&](std::int64_t a, std::int64_t b) {
    return level(a) != level(b) ? level(a) > level(b) : a > b;
  });
  blocks.resize(static_cast<std::size_t>(f.picks));
  std::ranges::sort(blocks);
  return blocks;
}

// Attention of a token over the picked blocks and all that is local.
void attend(const Stream& s, const Frame& f, const std::vector<std::int64_t>& picked,
            std::int64_t t, std::int64_t h, double* out) {
  const auto q = turned(s, query(s, t, h), t - f.shift());
  std::vector<double> scores;
  std::vector<std::uint8_t> marks;
  std::vector<std::int64_t> tokens;
  const auto see = [&](std::int64_t token, std::int64_t position) {
    scores.push_back(s.scale * product(q, turned(s, key(s, token, h), position)));
    marks.push_back(s.retrieval.has_landmarks() && token % f.block == f.block - 1 ? 1 : 0);
    tokens.push_back(token);
  };
  for (std::size_t i = 0; i < picked.size(); ++i)
    for (std::int64_t o = 0; o < f.block; ++o)
      see(picked[i] * f.block + o, f.place(picked[i], static_cast<std::int64_t>(i)) * f.block + o);
  for (std::int64_t j = f.first_local * f.block; j <= t; ++j) see(j, j - f.shift());
  const auto w =
      grouped_softmax(scores, marks, static_cast<std::int64_t>(scores.size()) - 1, false);
  for (std::size_t j = 0; j < w.size(); ++j)
    for (std::int64_t i = 0; w[j] != 0 && i < s.value_dim; ++i)
      out[i] += w[j] * value(s, tokens[j], h)[i];
}

}  // namespace

Read read_blocks(const Stream& s) {
  Read read;
  const std::int64_t K = std::max<std::int64_t>(s.retrieval.top_k, 0);
  read.out.resize(static_cast<std::size_t>(s.tokens * s.heads * s.value_dim));
  read.selected.assign(static_cast<std::size_t>(s.tokens * s.heads * K), -1);
  std::int64_t start = 0;
  for (const std::int64_t count : s.chunks) {
    for (const Group& group : groups_of(s.retrieval, start, count)) {
      const Frame f(s.retrieval, group.first_local);
      for (std::int64_t t = group.begin; t < group.end; ++t)
        for (std::int64_t h = 0; h < s.heads; ++h) {
          const auto picked = f.count() == 0 ? std::vector<std::int64_t>{}
                                             : pick(f, deciding_scores(s, f, group, t, h));
          attend(s, f, picked, t, h, read.out.data() + (t * s.heads + h) * s.value_dim);
          for (std::size_t i = 0; K > 0 && i < picked.size(); ++i)
            read.selected[static_cast<std::size_t>((t * s.heads + h) * K) + i] = picked[i];
        }
    }
    start += count;
  }
  return read;
}

}  // namespace everlong::landmark::reference
