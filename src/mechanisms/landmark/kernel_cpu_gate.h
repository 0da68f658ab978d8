// What landmark attention adds to the softmax block, on one tile of queries: scores of landmarks,
// sections folded into a row's sum, and the slopes that go through gates. SIMD, picked at run time.
//
// Legend: a tile has up to cpu::kTileRows queries; a panel of landmarks up to kPanel of them.
// Scores [landmark][kTileRows]; vectors of keys lie kKeyStride apart.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/cpu/softmax_block.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {

inline constexpr std::int64_t kPanel = 96, kKeyStride = 272;

// Queries, times `scale`, transposed to [dim][kTileRows], zeros behind `rows`.
void pack_queries(const cpu::Rows& q, int rows, int dim, float scale, float* to);
// Queries as they are, [kTileRows][kKeyStride].
void copy_queries(const cpu::Rows& q, int rows, int dim, float* to);
// The landmark keys of some closed sections (k: the rows of one head, from key 0): [kPanel]
// [kKeyStride], zeros where a section is open and behind the last.
void copy_landmarks(const cpu::Rows& k, std::span<const Section> sections, int dim, float* to);

// scores[j][r] = landmark j times query r.
void gate_scores(const float* landmarks, std::int64_t count, const float* queries, int dim,
                 float* scores);

// A row's running sum over sections, each a virtual key: [kTileRows] of top and sum, sums
// [kTileRows][stride].
struct Fold {
  float *top, *sum, *values;
  std::int64_t stride;
};
void begin_fold(const Fold& fold);
// Adds the section whose weight in row r is exp(score[r]) (-inf: none) and whose normalised value
// is `values` [kTileRows][stride], where its inner log-sum-exp `inner` is not -inf.
void fold_section(const Fold& fold, const float* score, const float* inner, const float* values,
                  int rows, int dim);
void finish_fold(const Fold& fold, int rows, int dim, const cpu::MutableRows& o,
                 const cpu::MutableRows& lse);

// D_b of each row: values [kTileRows][stride] . grad_o.
void section_slopes(const float* values, std::int64_t stride, const cpu::Rows& grad_o, int rows,
                    int dim, float* out);

// Slopes [landmark][kTileRows] of gates: grad_q [kTileRows][q_stride] += slopes^T landmarks,
// grad_landmarks [kPanel][kKeyStride] += slopes queries.
void gate_gradients(const float* slopes, std::int64_t count, const float* landmarks,
                    const float* queries, int rows, int dim, float* grad_q, std::int64_t q_stride,
                    float* grad_landmarks);

// Rows of fp32 [rows][stride] to where and as they belong.
void store_rows(const float* from, std::int64_t stride, int rows, int dim,
                const cpu::MutableRows& to);

}  // namespace everlong::landmark
