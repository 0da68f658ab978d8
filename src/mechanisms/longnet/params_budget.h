// What a choice of patterns costs and what it lets a query see: arithmetic alone, before anything
// is trained.
#pragma once
#include <string>
#include <vector>

#include "mechanisms/longnet/params_lattice.h"

namespace everlong::longnet {

struct BudgetShape {
  Geometry geometry;
  std::int64_t tokens = 0, heads = 1, kv_heads = 1, head_dim = 64, element_bytes = 2;
};

struct PatternBudget {
  Pattern pattern;
  double pairs = 0;       // (query, key) pairs of the whole text, all query heads
  std::int64_t rows = 0;  // most rows of a head's buffer within `tokens` tokens
  double covered = 0;     // share of (token, query head) that it serves
};

struct Budget {
  std::vector<PatternBudget> patterns;
  double pairs = 0;                // of all; a key seen twice counts twice, and is computed twice
  double forward_flops = 0;        // of the two products, 4 D a pair; backward 2.5 times that
  double dense_flops = 0;          // the same of dense attention over the text
  std::int64_t state_rows = 0;     // a key/value head
  std::int64_t state_bytes = 0;    // a sequence, a layer, at the text's end
  double dense_state_bytes = 0;    // of a KV cache of the text
  std::int64_t forgets_every = 0;  // tokens: where every pattern's segment begins anew (0: farther
                                   // than any position)
};

Result<Budget> budget_of(const BudgetShape& shape);

// What the query at `position` sees through one pattern: `rows` keys, `ratio` apart, the first at
// `first`. None when the pattern does not serve the query.
struct Sightline {
  std::size_t pattern = 0;
  std::int64_t first = 0, ratio = 1, rows = 0;
};
std::vector<Sightline> sightlines(const BudgetShape& shape, std::int64_t kv_head,
                                  std::int64_t position);

// One <svg> for people: a row a key/value head, positions from left (0) to right (`position`), the
// colour of the finest pattern through which that stretch of the text is seen and darker the denser
// the keys lie; two rows of labels. Follows a light or dark theme by itself.
std::string lattice_svg(const BudgetShape& shape, std::int64_t position);

}  // namespace everlong::longnet
