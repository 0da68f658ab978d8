// Keys and values laid out section by section, so that sections become a dimension.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

// Legend: C sections at most in a row of the batch, each padded to W ordinary tokens.
struct SectionTable {
  std::int64_t sections = 1, width = 1;  // C, W
  // For every query: how many sections any row sees of, its own included. Rising.
  std::vector<std::int64_t> seen;
  // Key positions, on the device: of ordinary tokens [B, C W] and of landmarks [B, C]. kNowhere
  // where there is none; that is later than every token, so nobody sees it.
  at::Tensor content, landmark;
  at::Tensor slot;   // [B, S]: where a key lies in (content, landmark), as one row of C W + C
  at::Tensor query;  // [T] key positions of the queries
  at::Tensor empty;  // bool [B, C]: closed without ordinary tokens
};
inline constexpr std::int64_t kNowhere = std::int64_t{1} << 62;

// marks [B, S] on the CPU, for the last `tokens` keys as queries.
SectionTable make_sections(const at::Tensor& marks_BS, std::int64_t tokens, at::Device device);

// How many times more room the padded table takes than the keys. Regular blocks: about 1.
double padding_of(const SectionTable& table);

// Rows of x [B, S, G, D] at positions [B, R], zeros where nowhere: [B, G, R, D].
at::Tensor rows_at(const at::Tensor& x_BSGD, const at::Tensor& positions_BR);
// Back: sums of rows [B, G, C W + C, D] to keys [B, S, G, D].
at::Tensor keys_from(const at::Tensor& rows_BGRD, const SectionTable& table);

}  // namespace everlong::landmark
