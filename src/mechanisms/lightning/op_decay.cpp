#include "mechanisms/lightning/op_decay.h"

#include <ATen/ATen.h>

#include <cmath>
#include <list>
#include <mutex>
#include <utility>

namespace everlong::lightning {
namespace {

// value(head, i, j) over an array [H, rows, columns], in float64 on the CPU, then moved.
template <class Value>
at::Tensor table(std::int64_t heads, std::int64_t rows, std::int64_t columns,
                 const at::TensorOptions& options, const Value& value) {
  at::Tensor out = at::empty({heads, rows, columns}, at::kDouble);
  double* data = out.data_ptr<double>();
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) *data++ = value(static_cast<std::size_t>(h), i, j);
  return out.to(options.dtype()).to(options.device());
}

DecayTables make_tables(const std::vector<double>& slope, double scale,
                        const at::TensorOptions& options, std::int64_t n, std::int64_t group) {
  const auto H = static_cast<std::int64_t>(slope.size());
  // Powers of lambda up to the longest distance: an exp per entry of the masks would cost more than
  // the masks.
  std::vector<std::vector<double>> token(slope.size()), chunk(slope.size());
  for (std::size_t h = 0; h < slope.size(); ++h) {
    for (std::int64_t t = 0; t <= n; ++t)
      token[h].push_back(std::exp(-slope[h] * static_cast<double>(t)));
    for (std::int64_t r = 0; r < group; ++r)
      chunk[h].push_back(std::exp(-slope[h] * static_cast<double>(n * r)));
  }
  const auto lost = [&](std::size_t h, std::int64_t tokens) {
    return std::expm1(-slope[h] * static_cast<double>(tokens));
  };
  DecayTables t;
  t.chunk = n;
  t.mask_H1nn = table(H, n, n, options, [&](std::size_t h, std::int64_t i, std::int64_t j) {
                  return i >= j ? scale * token[h][static_cast<std::size_t>(i - j)] : 0.0;
                }).unsqueeze(1);
  t.from_start_H1n1 = table(H, n, 1, options, [&](std::size_t h, std::int64_t i, std::int64_t) {
                        return scale * token[h][static_cast<std::size_t>(i + 1)];
                      }).unsqueeze(1);
  t.to_end_H1n1 = table(H, n, 1, options, [&](std::size_t h, std::int64_t j, std::int64_t) {
                    return token[h][static_cast<std::size_t>(n - 1 - j)];
                  }).unsqueeze(1);
  t.between_HRR =
      table(H, group, group, options, [&](std::size_t h, std::int64_t i, std::int64_t j) {
        return i > j ? chunk[h][static_cast<std::size_t>(i - j - 1)] : 0.0;
      });
  t.chunks_HR1 = table(H, group, 1, options, [&](std::size_t h, std::int64_t r, std::int64_t) {
    return chunk[h][static_cast<std::size_t>(r)];
  });
  t.lost_in_tokens_Hm =
      table(H, n + 1, 1, options, [&](std::size_t h, std::int64_t m, std::int64_t) {
        return lost(h, m);
      }).squeeze(2);
  t.lost_in_chunks_Hr =
      table(H, group + 1, 1, options, [&](std::size_t h, std::int64_t r, std::int64_t) {
        return lost(h, n * r);
      }).squeeze(2);
  return t;
}

}  // namespace

struct Decay::Content {
  struct Entry {
    at::Device device;
    at::ScalarType dtype;
    std::int64_t chunk, group;
    DecayTables tables;
  };
  std::vector<double> slope;
  double scale = 1;
  std::mutex mutex;
  std::list<Entry> entries;  // one or two; a list, so that references stay good
};

Decay::Decay(std::vector<double> slope, double scale) : content_(std::make_shared<Content>()) {
  content_->slope = std::move(slope);
  content_->scale = scale;
}

const std::vector<double>& Decay::slope() const { return content_->slope; }
double Decay::scale() const { return content_->scale; }

const DecayTables& Decay::tables(const at::TensorOptions& options, std::int64_t chunk,
                                 std::int64_t group) const {
  const at::Device device = options.device();
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const std::lock_guard lock(content_->mutex);
  for (const auto& entry : content_->entries)
    if (entry.device == device && entry.dtype == dtype && entry.chunk == chunk &&
        entry.group == group)
      return entry.tables;
  content_->entries.push_back(
      {device, dtype, chunk, group,
       make_tables(content_->slope, content_->scale, options, chunk, group)});
  return content_->entries.back().tables;
}

}  // namespace everlong::lightning
