#include "mechanisms/longnet/layer_state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "mechanisms/longnet/params_lattice.h"

namespace everlong::longnet {
namespace {

constexpr std::int64_t kFewestRows = 16;

std::string name_of(const char* what, std::size_t pattern) { return cat(what, pattern); }

at::Tensor resized(const at::Tensor& x, std::int64_t rows) {
  return at::constant_pad_nd(x, {0, 0, 0, rows - x.size(2)});
}

// Neighbouring sequences at one position with as many new tokens each.
struct Group {
  std::int64_t first = 0, count = 0, row = 0, token = 0, tokens = 0;
};

std::vector<Group> groups_of(const std::vector<std::int64_t>& positions, std::int64_t tokens,
                             const Sequences& sequences) {
  std::vector<Group> list;
  const bool packed = !sequences.offsets.empty();
  for (std::int64_t n = 0; n < static_cast<std::int64_t>(positions.size()); ++n) {
    const auto at = static_cast<std::size_t>(n);
    if (!packed && n > 0 && positions[at] == positions[at - 1]) {
      ++list.back().count;
      continue;
    }
    list.push_back(
        {n, 1, packed ? 0 : n, packed ? sequences.offsets[at] : 0, sequences.length(n, tokens)});
  }
  return list;
}

}  // namespace

std::int64_t capacity_for(const Pattern& pattern, std::int64_t position) {
  const std::int64_t seen = std::min(position, pattern.segment);
  const std::int64_t most = (seen + pattern.ratio - 1) / pattern.ratio;
  if (most == 0) return 0;
  std::int64_t rows = kFewestRows;
  while (rows < most) rows *= 2;
  return std::min(rows, pattern.rows());
}

LatticeState::LatticeState(std::int64_t sequences, const StateShape& shape,
                           const at::TensorOptions& options)
    : State(sequences), shape_(shape) {
  for (std::size_t i = 0; i < shape.geometry.patterns.size(); ++i) {
    k_.push_back(at::zeros({sequences, shape.kv_heads, 0, shape.key_dim}, options));
    v_.push_back(at::zeros({sequences, shape.kv_heads, 0, shape.value_dim}, options));
  }
}

TensorMap LatticeState::tensors() const {
  TensorMap all;
  for (std::size_t i = 0; i < k_.size(); ++i) {
    all[name_of("k", i)] = k_[i];
    all[name_of("v", i)] = v_[i];
  }
  return all;
}

Status LatticeState::restore(const TensorMap& tensors) {
  const TensorMap mine = tensors.empty() ? TensorMap{} : this->tensors();
  if (tensors.size() != 2 * k_.size())
    return invalid_argument("longnet: a state of ", k_.size(), " patterns needs ", 2 * k_.size(),
                            " tensors, k0, v0, k1, ..; ", tensors.size(), " were given");
  for (const auto& [name, own] : mine) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return invalid_argument("longnet: state ", name, " is missing");
    const at::Tensor& given = found->second;
    const std::int64_t most =
        shape_.geometry.patterns[static_cast<std::size_t>(std::stol(name.substr(1)))].rows();
    if (given.dim() != 4 || given.scalar_type() != own.scalar_type() ||
        given.size(0) != own.size(0) || given.size(1) != own.size(1) || given.size(2) > most ||
        given.size(3) != own.size(3))
      return invalid_argument("longnet: state ", name, " is ", given.scalar_type(), " ",
                              given.sizes(), "; ", own.scalar_type(), " [", own.size(0), ", ",
                              own.size(1), ", at most ", most, " rows, ", own.size(3),
                              "] is needed");
  }
  for (std::size_t i = 0; i < k_.size(); ++i)
    if (tensors.at(name_of("k", i)).size(2) != tensors.at(name_of("v", i)).size(2))
      return invalid_argument("longnet: state k", i, " and v", i, " have different rows");
  const at::Device device = k_.front().device();
  for (std::size_t i = 0; i < k_.size(); ++i) {
    k_[i] = tensors.at(name_of("k", i)).to(device);
    v_[i] = tensors.at(name_of("v", i)).to(device);
  }
  owned_ = false;
  return {};
}

std::unique_ptr<State> LatticeState::select(std::span<const std::int64_t> sequences) const {
  check_rows();
  auto picked = std::make_unique<LatticeState>(static_cast<std::int64_t>(sequences.size()), shape_,
                                               k_.front().options());
  picked->positions() = selected_positions(sequences);
  std::int64_t furthest = 0;
  for (const std::int64_t position : picked->positions()) furthest = std::max(furthest, position);
  const auto rows = capacities(furthest);
  for (std::size_t i = 0; i < k_.size(); ++i) {
    const auto take = [&](const at::Tensor& x) {
      const std::int64_t common = std::min(rows[i], x.size(2));
      return resized(select_sequences(x.narrow(2, 0, common), sequences), rows[i]);
    };
    picked->k_[i] = take(k_[i]);
    picked->v_[i] = take(v_[i]);
  }
  picked->owned_ = !at::GradMode::is_enabled();
  return picked;
}

std::int64_t LatticeState::bytes_bound(std::int64_t tokens) const {
  double rows = 0;
  for (const Pattern& pattern : shape_.geometry.patterns)
    rows += static_cast<double>(capacity_for(pattern, tokens));
  const double a_row = static_cast<double>(shape_.kv_heads * (shape_.key_dim + shape_.value_dim)) *
                       static_cast<double>(k_.front().element_size());
  const double most = static_cast<double>(sequences()) * (8 + a_row * rows);
  return most > 0x1p62 ? std::numeric_limits<std::int64_t>::max() : static_cast<std::int64_t>(most);
}

std::vector<std::vector<std::int64_t>> LatticeState::rows(std::int64_t sequence) const {
  const std::int64_t position = positions().at(static_cast<std::size_t>(sequence));
  std::vector<std::vector<std::int64_t>> all;
  for (const Pattern& pattern : shape_.geometry.patterns) {
    all.emplace_back();
    for (std::int64_t g = 0; g < shape_.kv_heads; ++g)
      all.back().push_back(rows_held(
          pattern, offset_of(shape_.geometry.offset_rule, g, shape_.kv_heads, pattern.ratio),
          position));
  }
  return all;
}

std::vector<std::int64_t> LatticeState::capacities(std::int64_t position) const {
  std::vector<std::int64_t> rows;
  for (const Pattern& pattern : shape_.geometry.patterns)
    rows.push_back(capacity_for(pattern, position));
  return rows;
}

void LatticeState::check_rows() const {
  for (std::int64_t n = 0; n < sequences(); ++n) {
    const auto held = rows(n);
    for (std::size_t i = 0; i < held.size(); ++i)
      TORCH_CHECK_VALUE(*std::ranges::max_element(held[i]) <= k_[i].size(2),
                        "longnet: a state at position ", positions()[static_cast<std::size_t>(n)],
                        " needs ", *std::ranges::max_element(held[i]), " rows of pattern ", i,
                        "; its tensors have ", k_[i].size(2),
                        ". Restore the tensors that belong to the position.");
  }
}

// Buffers of its own, large enough for a sequence at `position`.
void LatticeState::reserve(std::int64_t position) {
  const auto rows = capacities(position);
  for (std::size_t i = 0; i < k_.size(); ++i) {
    for (auto* x : {&k_[i], &v_[i]}) {
      if (x->size(2) < rows[i])
        *x = resized(*x, rows[i]);
      else if (!owned_)
        *x = x->detach().clone();
    }
  }
  owned_ = true;
}

Past LatticeState::past_of(std::int64_t first, std::int64_t count) const {
  Past past;
  past.position = positions()[static_cast<std::size_t>(first)];
  for (std::size_t i = 0; i < k_.size(); ++i) {
    past.k.push_back(k_[i].narrow(0, first, count));
    past.v.push_back(v_[i].narrow(0, first, count));
  }
  return past;
}

// The lattice rows of new tokens, into the buffers of sequences [first, first + count).
void LatticeState::write(std::int64_t first, std::int64_t count, const at::Tensor& k,
                         const at::Tensor& v) {
  const std::int64_t position = positions()[static_cast<std::size_t>(first)];
  const std::int64_t end = position + k.size(1);
  if (end == position) return;
  for (std::size_t i = 0; i < k_.size(); ++i) {
    const Pattern& pattern = shape_.geometry.patterns[i];
    const auto [w, r] = pattern;
    const std::int64_t start = (end - 1) / w * w;
    for (const HeadClass& c : head_classes(shape_.geometry.offset_rule, shape_.kv_heads, r)) {
      const std::int64_t held = rows_held(pattern, c.offset, end);
      const std::int64_t kept =
          lattice_rows(std::max<std::int64_t>(position - start, 0), c.offset, r);
      const std::int64_t last_head = c.first + c.step * (c.count - 1) + 1;
      const std::int64_t token = start + c.offset + kept * r - position;
      for (const auto& [buffer, x] : {std::pair(&k_[i], &k), {&v_[i], &v}}) {
        const at::Tensor mine =
            buffer->narrow(0, first, count).slice(1, c.first, last_head, c.step);
        if (held > kept)
          mine.narrow(2, kept, held - kept)
              .copy_(x->slice(2, c.first, last_head, c.step)
                         .slice(1, token, token + (held - kept - 1) * r + 1, r)
                         .transpose(1, 2));
        // A segment that began in this call: what the one before left is cleared.
        if (start >= position && start > 0) mine.narrow(2, held, mine.size(2) - held).zero_();
      }
    }
  }
}

at::Tensor LatticeState::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const Sequences& sequences, const Options& options) {
  check_rows();
  const auto groups = groups_of(positions(), q.size(1), sequences);
  std::int64_t furthest = 0;
  for (const Group& g : groups)
    furthest = std::max(furthest, positions()[static_cast<std::size_t>(g.first)] + g.tokens);
  for (const std::int64_t position : positions()) furthest = std::max(furthest, position);
  const bool in_place = !at::GradMode::is_enabled();
  const auto rows = capacities(furthest);
  if (in_place) reserve(furthest);

  std::vector<at::Tensor> outputs;
  std::vector<Past> next;
  for (const Group& g : groups) {
    const auto mine = [&](const at::Tensor& x) {
      return x.narrow(0, g.row, g.count).narrow(1, g.token, g.tokens);
    };
    const Past past = past_of(g.first, g.count);
    outputs.push_back(attention(mine(q), mine(k), mine(v), options, past));
    if (in_place)
      write(g.first, g.count, mine(k), mine(v));
    else
      next.push_back(advanced(past, mine(k), mine(v), shape_.geometry, rows));
  }
  if (!in_place && !next.empty()) {
    for (std::size_t i = 0; i < k_.size(); ++i) {
      std::vector<at::Tensor> keys, values;
      for (const Past& past : next) {
        keys.push_back(past.k[i]);
        values.push_back(past.v[i]);
      }
      k_[i] = at::cat(keys, 0);
      v_[i] = at::cat(values, 0);
    }
    owned_ = false;
  }
  for (const Group& g : groups)
    for (std::int64_t n = g.first; n < g.first + g.count; ++n)
      positions()[static_cast<std::size_t>(n)] += g.tokens;
  return outputs.size() == 1 ? outputs.front()
                             : at::cat(outputs, sequences.offsets.empty() ? 0 : 1);
}

}  // namespace everlong::longnet
