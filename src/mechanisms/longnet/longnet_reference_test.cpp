#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include "mechanisms/longnet/params_lattice.h"
#include "mechanisms/longnet/reference.h"

namespace everlong::longnet {
namespace {

struct Data {
  reference::Problem problem;
  std::vector<double> q, k, v, grad_out;
};

void draw(std::vector<double>& x, std::int64_t n, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  x.resize(static_cast<std::size_t>(n));
  for (double& value : x) value = normal(random);
}

// Filled in place: the problem's spans point into it.
void random_case(const reference::Problem& shape, Data& data) {
  std::mt19937_64 random(static_cast<std::uint64_t>(shape.tokens * 31 + shape.position));
  const std::int64_t T = shape.tokens;
  draw(data.q, T * shape.heads * shape.key_dim, random);
  draw(data.k, T * shape.kv_heads * shape.key_dim, random);
  draw(data.v, T * shape.kv_heads * shape.value_dim, random);
  draw(data.grad_out, T * shape.heads * shape.value_dim, random);
  data.problem = shape;
  data.problem.q = data.q;
  data.problem.k = data.k;
  data.problem.v = data.v;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

Geometry geometry(std::vector<Pattern> patterns, OffsetRule rule = OffsetRule::kMod,
                  bool causal = true) {
  Geometry g;
  g.patterns = std::move(patterns);
  g.offset_rule = rule;
  g.causal = causal;
  return g;
}

reference::Problem problem(const Geometry& g, std::int64_t tokens, std::int64_t heads = 4,
                           std::int64_t kv_heads = 4) {
  reference::Problem p;
  p.geometry = g, p.tokens = tokens, p.heads = heads, p.kv_heads = kv_heads;
  p.key_dim = 4, p.value_dim = 3, p.scale = 0.7;
  return p;
}

// Patterns that nest, that do not divide, that leave rows uncovered, with more ratio than heads.
std::vector<Geometry> geometries() {
  std::vector<Geometry> list;
  const std::vector<std::vector<Pattern>> sets = {{{8, 1}},          {{8, 1}, {16, 2}, {32, 4}},
                                                  {{8, 1}, {20, 3}}, {{6, 2}, {24, 5}},
                                                  {{5, 1}, {30, 9}}, {{4, 1}, {4, 1}}};
  for (const auto& patterns : sets)
    for (const OffsetRule rule : {OffsetRule::kMod, OffsetRule::kBlock}) {
      list.push_back(geometry(patterns, rule));
      list.push_back(geometry(patterns, rule, false));
      list.push_back(geometry(patterns, rule, false));
      list.back().phantom = true;
      list.push_back(geometry(patterns, rule));
      list.back().beyond = Beyond::kGrow;
    }
  return list;
}

TEST(LongnetReference, ClosedFormEqualsMergeEqualsRecurrence) {
  for (const Geometry& g : geometries())
    for (const std::int64_t tokens : {1, 7, 8, 37, 53})
      for (const auto& [heads, kv] :
           {std::pair<std::int64_t, std::int64_t>{4, 4}, {6, 3}, {2, 1}}) {
        Data data;
        random_case(problem(g, tokens, heads, kv), data);
        const auto want = reference::closed_form(data.problem);
        EXPECT_LT(largest_difference(reference::merged(data.problem).out, want), 1e-12);
        if (!g.causal) continue;
        EXPECT_LT(largest_difference(reference::recurrent(data.problem), want), 1e-12);
      }
}

// Property 5 and the state: two calls with the buffers between them are one.
TEST(LongnetReference, AnyCutIsOnePass) {
  for (const Geometry& g : geometries()) {
    if (!g.causal) continue;
    Data whole;
    random_case(problem(g, 47), whole);
    const auto want = reference::closed_form(whole.problem);
    for (const std::int64_t cut : {1, 5, 8, 16, 24, 33, 46}) {
      reference::Problem first = whole.problem, second = whole.problem;
      first.tokens = cut;
      first.q = whole.problem.q.first(static_cast<std::size_t>(cut * 16));
      first.k = whole.problem.k.first(static_cast<std::size_t>(cut * 16));
      first.v = whole.problem.v.first(static_cast<std::size_t>(cut * 12));
      second.tokens = 47 - cut;
      second.position = cut;
      second.q = whole.problem.q.subspan(static_cast<std::size_t>(cut * 16));
      second.k = whole.problem.k.subspan(static_cast<std::size_t>(cut * 16));
      second.v = whole.problem.v.subspan(static_cast<std::size_t>(cut * 12));
      second.past = reference::final_buffers(first);
      for (const auto form : {reference::closed_form, reference::recurrent}) {
        auto joined = form(first);
        const auto rest = form(second);
        joined.insert(joined.end(), rest.begin(), rest.end());
        EXPECT_LT(largest_difference(joined, want), 1e-12) << "cut " << cut;
      }
    }
  }
}

// What lies behind the rows that are held is neither read nor passed on.
TEST(LongnetReference, RowsThatAreNotHeldCountForNothing) {
  const Geometry g = geometry({{8, 1}, {16, 2}});
  Data before, data;
  random_case(problem(g, 11), before);
  auto shape = problem(g, 3);
  shape.position = 11;
  random_case(shape, data);
  data.problem.past = reference::final_buffers(before.problem);
  const auto want = reference::closed_form(data.problem);
  const auto kept = reference::final_buffers(data.problem);
  for (std::int64_t head = 0; head < 4; ++head)  // rows 3 to 7 of the first pattern's eight
    for (std::int64_t l = 3; l < 8; ++l) {
      data.problem.past.k[0][static_cast<std::size_t>((head * 8 + l) * 4)] = NAN;
      data.problem.past.v[0][static_cast<std::size_t>((head * 8 + l) * 3)] = NAN;
    }
  EXPECT_EQ(reference::closed_form(data.problem), want);
  EXPECT_LT(largest_difference(reference::recurrent(data.problem), want), 1e-12);
  EXPECT_EQ(reference::final_buffers(data.problem).k, kept.k);
  EXPECT_EQ(reference::final_buffers(data.problem).v, kept.v);
}

TEST(LongnetReference, TwoTokensByHand) {
  // Two patterns see both tokens of head 0: token 1 has scores 0 and ln 3, each twice, so 1/4 and
  // 3/4. With a lattice of 2 token 1 is off it, and token 0 is not seen from there.
  Data data;
  auto p = problem(geometry({{2, 1}, {4, 1}}), 2, 1, 1);
  p.key_dim = p.value_dim = 1, p.scale = 1;
  random_case(p, data);
  data.q = {1, 1}, data.k = {0, std::log(3.0)}, data.v = {8, 4};
  data.problem.q = data.q, data.problem.k = data.k, data.problem.v = data.v;
  EXPECT_LT(largest_difference(reference::closed_form(data.problem), {8, 5}), 1e-15);
  data.problem.geometry.patterns = {{1, 1}, {4, 2}};
  EXPECT_LT(largest_difference(reference::closed_form(data.problem), {8, 4}), 1e-15);
  // No pattern covers token 1: nothing.
  data.problem.geometry.patterns = {{4, 2}};
  EXPECT_LT(largest_difference(reference::closed_form(data.problem), {8, 0}), 1e-15);
  // Trap 2: a key that two patterns share weighs twice: token 2 sees 0 through both patterns,
  // token 1 through the first alone.
  auto three = problem(geometry({{4, 1}, {4, 2}}), 3, 1, 1);
  three.key_dim = three.value_dim = 1, three.scale = 1;
  Data more;
  random_case(three, more);
  more.q = {0, 0, 0}, more.k = {0, 0, 0}, more.v = {5, 10, 0};
  more.problem.q = more.q, more.problem.k = more.k, more.problem.v = more.v;
  EXPECT_LT(largest_difference(reference::closed_form(more.problem), {5, 7.5, 4}), 1e-15);
}

// Property 11: both gradients, the detached one of the function with its mixing weights held.
TEST(LongnetReference, GradientsEqualFiniteDifferences) {
  for (Geometry g : geometries())
    for (const bool detached : {false, true}) {
      g.detached = detached;
      Data data;
      random_case(problem(g, 13, 2, g.patterns.size() > 2 ? 1 : 2), data);
      const auto held = reference::merged(data.problem).mix;
      const auto loss = [&] {
        const auto out = detached ? reference::mixed_by(data.problem, held)
                                  : reference::closed_form(data.problem);
        double sum = 0;
        for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * data.grad_out[i];
        return sum;
      };
      const auto got = reference::gradients(data.problem, data.grad_out);
      const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient) {
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double kept = x[i], step = 1e-5;  // truncation 1e-10, cancellation 1e-10
          x[i] = kept + step;
          const double up = loss();
          x[i] = kept - step;
          const double down = loss();
          x[i] = kept;
          EXPECT_NEAR(gradient[i], (up - down) / (2 * step), 1e-8);
        }
      };
      check(data.q, got.q);
      check(data.k, got.k);
      check(data.v, got.v);
    }
}

TEST(LongnetReference, GradientsOfTheBuffersEqualFiniteDifferences) {
  for (const Geometry& g : geometries()) {
    if (!g.causal) continue;
    Data before, data;
    random_case(problem(g, 11, 2, 2), before);
    auto shape = problem(g, 6, 2, 2);
    shape.position = 11;
    random_case(shape, data);
    data.problem.past = reference::final_buffers(before.problem);
    const auto got = reference::gradients(data.problem, data.grad_out);
    for (std::size_t i = 0; i < g.patterns.size(); ++i)
      for (const auto& [buffer, gradient] : {std::pair(&data.problem.past.k[i], &got.past.k[i]),
                                             std::pair(&data.problem.past.v[i], &got.past.v[i])})
        for (std::size_t n = 0; n < buffer->size(); ++n) {
          const auto loss = [&](double value) {
            const double kept = std::exchange((*buffer)[n], value);
            const auto out = reference::closed_form(data.problem);
            (*buffer)[n] = kept;
            double sum = 0;
            for (std::size_t j = 0; j < out.size(); ++j) sum += out[j] * data.grad_out[j];
            return sum;
          };
          const double x = (*buffer)[n], step = 1e-5;
          EXPECT_NEAR((*gradient)[n], (loss(x + step) - loss(x - step)) / (2 * step), 1e-8);
        }
  }
}

// Trap 6: holding the mixing weights changes the gradient of queries and keys, not that of values.
TEST(LongnetReference, DetachedGradientDiffersInQueriesAndKeysAlone) {
  Geometry g = geometry({{8, 1}, {16, 2}, {32, 4}});
  Data data;
  random_case(problem(g, 32), data);
  const auto joint = reference::gradients(data.problem, data.grad_out);
  data.problem.geometry.detached = true;
  const auto detached = reference::gradients(data.problem, data.grad_out);
  EXPECT_GT(largest_difference(joint.q, detached.q), 1e-2);
  EXPECT_GT(largest_difference(joint.k, detached.k), 1e-2);
  EXPECT_LT(largest_difference(joint.v, detached.v), 1e-15);
}

// Traps 1 and 3 and the lattice arithmetic, by the definition.
TEST(LongnetLattice, RunsListExactlyTheLattice) {
  for (const Geometry& g : geometries())
    for (const std::int64_t position : {0, 3, 8, 20, 61})
      for (const std::int64_t tokens : {1, 5, 8, 30, 71}) {
        if (!g.causal && position > 0) continue;
        for (std::size_t i = 0; i < g.patterns.size(); ++i) {
          const auto [w, r] = g.patterns[i];
          std::vector<int> heads_seen(7, 0);
          for (const HeadClass& c : head_classes(g.offset_rule, 7, r)) {
            std::vector<std::int64_t> queries, keys;
            for (const LatticeRun& run : make_runs(g, i, c.offset, position, tokens))
              for (std::int64_t n = 0; n < run.segments; ++n) {
                for (std::int64_t l = 0; l < run.keys; ++l)
                  keys.push_back(run.key_token + n * w + l * r);
                for (std::int64_t l = run.keys - run.queries; l < run.keys; ++l)
                  queries.push_back(run.key_token + n * w + l * r);
                // What comes before the first key of the call in its segment is the buffer's.
                const std::int64_t local = (position + run.key_token) % w;
                EXPECT_EQ(run.past, n > 0 ? 0 : lattice_rows(local, c.offset, r));
              }
            std::vector<std::int64_t> want;
            for (std::int64_t t = 0; t < tokens; ++t)
              if ((position + t) % w % r == c.offset) want.push_back(t);
            std::vector<std::int64_t> active;
            for (const std::int64_t t : want)
              if (position + t >= g.active_from(i)) active.push_back(t);
            EXPECT_EQ(queries, active);
            if (g.beyond == Beyond::kFixed) {
              EXPECT_EQ(keys, want);
            }
            for (std::int64_t n = 0; n < c.count; ++n) {
              const auto head = static_cast<std::size_t>(c.first + n * c.step);
              ++heads_seen[head];
              EXPECT_EQ(offset_of(g.offset_rule, c.first + n * c.step, 7, r), c.offset);
            }
          }
          EXPECT_EQ(heads_seen, std::vector<int>(7, 1));
        }
      }
}

TEST(LongnetLattice, OffsetRulesDiffer) {
  // Trap 1. Twelve heads, r = 4: block gives heads 0..2 offset 0, mod gives 0, 4, 8.
  std::vector<std::int64_t> block, mod;
  for (std::int64_t h = 0; h < 12; ++h) {
    block.push_back(offset_of(OffsetRule::kBlock, h, 12, 4));
    mod.push_back(offset_of(OffsetRule::kMod, h, 12, 4));
  }
  EXPECT_EQ(block, (std::vector<std::int64_t>{0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3}));
  EXPECT_EQ(mod, (std::vector<std::int64_t>{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}));
  // With more residues than heads both give the head itself.
  for (std::int64_t h = 0; h < 3; ++h) {
    EXPECT_EQ(offset_of(OffsetRule::kBlock, h, 3, 8), h);
    EXPECT_EQ(offset_of(OffsetRule::kMod, h, 3, 8), h);
  }
}

TEST(LongnetLattice, PairsAreThoseOfTheDefinition) {
  for (const Geometry& g : geometries()) {
    double pairs = 0;
    for (std::size_t i = 0; i < g.patterns.size(); ++i)
      for (std::int64_t head = 0; head < 4; ++head) {
        const auto [w, r] = g.patterns[i];
        const std::int64_t s = offset_of(g.offset_rule, head, 4, r);
        for (std::int64_t p = 0; p < 50; ++p)
          for (std::int64_t j = 0; j < 50; ++j)
            pairs += p / w == j / w && p % w % r == s && j % w % r == s && (j <= p || !g.causal) &&
                     p >= g.active_from(i);
      }
    EXPECT_EQ(visible_pairs(g, 4, 0, 50), pairs);
  }
}

TEST(LongnetLattice, StateRowsNeverExceedTheBound) {
  for (const Geometry& g : geometries())
    for (const Pattern& pattern : g.patterns)
      for (std::int64_t s = 0; s < pattern.ratio; ++s) {
        std::int64_t most = 0;
        for (std::int64_t position = 0; position < 200; ++position)
          most = std::max(most, rows_held(pattern, s, position));
        EXPECT_LE(most, pattern.rows());
        if (s == 0) {
          EXPECT_EQ(most, pattern.rows());
        }
      }
}

TEST(LongnetParams, RefusalsSayWhatIsAllowed) {
  const auto refused = [](auto result, const char* word) {
    EXPECT_FALSE(result.ok());
    EXPECT_NE(result.status().message().find(word), std::string::npos);
  };
  const std::vector<std::int64_t> none, one = {8}, two = {8, 16}, zero = {0};
  refused(make_patterns(none, none), "patterns");
  refused(make_patterns(two, one), "dilated_ratio");
  refused(make_patterns(zero, one), "segment_length[0]");
  refused(make_patterns(one, zero), "dilated_ratio[0]");
  EXPECT_TRUE(make_patterns(two, two).ok());
}

}  // namespace
}  // namespace everlong::longnet
