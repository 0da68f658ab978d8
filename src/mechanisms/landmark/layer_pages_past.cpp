#include "mechanisms/landmark/layer_pages_past.h"

#include <ATen/ATen.h>

namespace everlong::landmark {

PageQueries page_queries(const PastQueries& queries, std::int64_t g) {
  const at::Tensor& q = queries.places_GSnK;
  return {queries.frame, g, q.size(2), q.const_data_ptr<float>() + g * q.stride(0), queries.scale};
}

at::Tensor deciding_scores(const at::Tensor& scores_Gnc, const PastQueries& queries) {
  if (queries.granularity == Granularity::kTokenHead) return scores_Gnc;
  const at::Tensor shares = at::log_softmax(scores_Gnc, -1).unflatten(1, {queries.tokens, -1});
  const at::Tensor most = queries.granularity == Granularity::kHeadMaxOverTokens
                              ? shares.amax(1, true)
                              : shares.amax({0, 2}, true);
  return most.expand_as(shares).flatten(1, 2);
}

PastRead HostPast::read(const PastQueries& queries) const {
  const std::int64_t G = queries.places_GSnK.size(0), n = queries.places_GSnK.size(2),
                     P = queries.frame.picks, V = pages_.shape().value_dim;
  PastRead all{at::empty({G, n, P, V}), at::empty({G, n, P}), at::empty({G, n, P}, at::kLong)};
  const auto picks = pick(queries);
  for (std::int64_t g = 0; g < G; ++g) {
    const auto& of_head = picks[static_cast<std::size_t>(g)];
    throw_if_error(read_picked(pages_, page_queries(queries, g), of_head,
                               queries.near_Gn.const_data_ptr<float>() + g * n,
                               all.out_GnPV.mutable_data_ptr<float>() + g * n * P * V,
                               all.gates_GnP.mutable_data_ptr<float>() + g * n * P));
    auto* to = all.selected_GnP.mutable_data_ptr<std::int64_t>() + g * n * P;
    for (const auto& of_query : of_head)
      for (const Pick& p : of_query) *to++ = p.block;
  }
  return all;
}

std::vector<HostPast::Picks> HostPast::pick(const PastQueries& queries) const {
  const std::int64_t G = queries.places_GSnK.size(0), n = queries.places_GSnK.size(2),
                     P = queries.frame.picks;
  std::vector<Picks> picks(static_cast<std::size_t>(G));
  if (queries.granularity == Granularity::kTokenHead) {
    for (std::int64_t g = 0; g < G; ++g)
      throw_if_error(
          pick_blocks(pages_, page_queries(queries, g), picks[static_cast<std::size_t>(g)]));
    return picks;
  }
  // Tokens or heads decide together: all scores at once.
  const at::Tensor scores = all_scores(queries);
  const at::Tensor chosen = picked_blocks(deciding_scores(scores, queries), P).contiguous();
  const at::Tensor own = scores.gather(-1, chosen).contiguous();
  const auto* block = chosen.const_data_ptr<std::int64_t>();
  const auto* score = own.const_data_ptr<float>();
  for (Picks& of_head : picks)
    for (std::int64_t i = 0; i < n; ++i) {
      of_head.emplace_back();
      for (std::int64_t p = 0; p < P; ++p)
        of_head.back().push_back({*block++ + queries.frame.oldest, *score++});
    }
  return picks;
}

at::Tensor HostPast::all_scores(const PastQueries& queries) const {
  const Frame& frame = queries.frame;
  const std::int64_t G = queries.places_GSnK.size(0), n = queries.places_GSnK.size(2),
                     K = queries.places_GSnK.size(3), count = frame.count();
  const at::Tensor scores = at::empty({G, n, count});
  for (std::int64_t g = 0; g < G; ++g)
    for (std::int64_t i = 0; i < n; ++i) {
      float* to = scores.mutable_data_ptr<float>() + (g * n + i) * count;
      const auto score = [&](std::int64_t begin, std::int64_t end) {
        const float* q = page_queries(queries, g).q_SnK + (frame.slot(begin) * n + i) * K;
        throw_if_error(
            pages_.scores(g, {q, begin, end}, queries.scale,
                          {to + (begin - frame.oldest), static_cast<std::size_t>(end - begin)}));
      };
      const std::int64_t recent = frame.first_local - frame.picks;
      if (recent > frame.oldest) score(frame.oldest, recent);
      for (std::int64_t b = recent; b < frame.first_local; ++b) score(b, b + 1);
    }
  return scores;
}

}  // namespace everlong::landmark
