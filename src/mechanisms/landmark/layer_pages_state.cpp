// What leaves and enters a PagedMemory: tensors, forks, folders.
#include <ATen/ATen.h>

#include <cstring>

#include "mechanisms/landmark/layer_pages.h"

namespace everlong::landmark {
namespace {

fs::path state_file(const fs::path& folder, std::int64_t n) {
  return folder / cat("sequence_", n, ".blocks");
}

void append_bytes(std::vector<std::byte>& to, const void* from, std::size_t bytes) {
  const auto* start = static_cast<const std::byte*>(from);
  to.insert(to.end(), start, start + bytes);
}

}  // namespace

TensorMap PagedMemory::tensors() const {
  if (!given_.empty()) return given_;
  const RowPolicy policy = row_policy(shape_);
  const PageShape& s = store_->shape();
  std::int64_t rows = 0;
  for (const std::int64_t position : positions()) rows = std::max(rows, policy.held_rows(position));
  rows = policy.capacity_for(rows);
  const auto here = options_.device(at::kCPU);
  const at::Tensor k = at::zeros({sequences(), s.kv_heads, rows, s.key_dim}, here);
  const at::Tensor v = at::zeros({sequences(), s.kv_heads, rows, s.value_dim}, here);
  std::vector<float> landmark(static_cast<std::size_t>(s.key_dim));
  for (std::int64_t n = 0; n < sequences(); ++n) {
    const Line& line = lines_[static_cast<std::size_t>(n)];
    const std::int64_t position = positions()[static_cast<std::size_t>(n)];
    const std::int64_t first = policy.first_row(position);
    const auto put = [&](const at::Tensor& to, std::int64_t g, std::int64_t row, const void* from,
                         std::int64_t bytes) {
      std::memcpy(static_cast<std::byte*>(to.mutable_data_ptr()) +
                      ((n * s.kv_heads + g) * rows + row) * to.size(3) * s.element(),
                  from, static_cast<std::size_t>(bytes));
    };
    for (std::int64_t b = line.pages.first(); b < line.pages.end(); ++b) {
      if (b * s.block < first) continue;
      for (std::int64_t g = 0; g < s.kv_heads; ++g) {
        const std::int64_t row = b * s.block - first;
        const auto page = line.pages.read(b, g, 0);
        throw_if_error(page.status());
        const std::byte* bytes = page->bytes().data();
        put(k, g, row, bytes, s.key_bytes());
        put(v, g, row, bytes + s.key_bytes(), s.page_bytes() - s.key_bytes());
        throw_if_error(line.pages.landmark(b, g, landmark));
        k.select(0, n)
            .select(0, g)
            .select(0, row + s.tokens())
            .copy_(at::tensor(at::ArrayRef<float>(landmark)));
      }
    }
    const std::int64_t open = line.pages.end() * s.block;
    if (open >= position) continue;
    for (const auto& [to, tail] : {std::pair{&k, &line.k}, {&v, &line.v}})
      to->select(0, n)
          .narrow(1, open - first, position - open)
          .copy_(tail->narrow(1, open - line.tail_first, position - open));
  }
  return {{"k", k.to(options_.device())}, {"v", v.to(options_.device())}};
}

Status PagedMemory::restore(const TensorMap& tensors) {
  // BlockMemory knows what fits.
  BlockMemory judge(sequences(), shape_, options_);
  EVERLONG_RETURN_IF_ERROR(judge.restore(tensors));
  given_ = judge.tensors();
  broken_.clear();
  return {};
}

PagedMemory::Line PagedMemory::line_of(const at::Tensor& k_GRK, const at::Tensor& v_GRV,
                                       std::int64_t position) const {
  const Retrieval& r = shape_.retrieval;
  const std::int64_t first = row_policy(shape_).first_row(position);
  TORCH_CHECK_VALUE(position >= 0 && position - first <= k_GRK.size(1),
                    "landmark: a state at position ", position, " needs ", position - first,
                    " rows; its tensors have ", k_GRK.size(1),
                    ". Restore the tensors that belong to the position.");
  Line line = fresh_line();
  line.pages = BlockPages(store_, kept_blocks(r), first / r.block);
  line.landmarks = DeviceLandmarks(first / r.block);
  const auto held = [&](const at::Tensor& x) {
    return x.narrow(1, 0, position - first).contiguous();
  };
  line.k = held(k_GRK);
  line.v = held(v_GRV);
  line.tail_first = first;
  close_blocks(line, position);
  return line;
}

void PagedMemory::settle() const {
  if (given_.empty()) return;
  const at::Tensor k = given_.at("k"), v = given_.at("v");
  lines_.clear();
  if (pool_) pool_->clear();
  for (std::int64_t n = 0; n < sequences(); ++n)
    lines_.push_back(line_of(k.select(0, n).detach(), v.select(0, n).detach(),
                             positions()[static_cast<std::size_t>(n)]));
  given_.clear();
}

std::unique_ptr<State> PagedMemory::select(std::span<const std::int64_t> sequences) const {
  TORCH_CHECK_VALUE(broken_.empty(), "landmark: this state cannot be copied: ", broken_);
  settle();
  std::unique_ptr<PagedMemory> picked(
      new PagedMemory(0, shape_, options_, store_, tiers_, device_bytes_));
  picked->certify_ = certify_;
  picked->positions() = selected_positions(sequences);
  for (const std::int64_t n : sequences) {
    if (n < 0) {
      picked->lines_.push_back(fresh_line());
      continue;
    }
    const Line& line = lines_[static_cast<std::size_t>(n)];
    picked->lines_.push_back({line.pages.fork(), line.k, line.v, line.tail_first,
                              line.landmarks.fork(), line.last_picks});
  }
  return picked;
}

void PagedMemory::copy_landmarks(Line& line) const {
  if (!pool_) return;
  const PageShape& s = store_->shape();
  const std::int64_t first = line.pages.first(), count = line.pages.end() - first;
  line.landmarks = DeviceLandmarks(first);
  if (count == 0) return;
  const at::Tensor keys = at::empty({s.kv_heads, count, s.key_dim});
  for (std::int64_t g = 0; g < s.kv_heads; ++g)
    for (std::int64_t b = 0; b < count; ++b)
      throw_if_error(
          line.pages.landmark(first + b, g,
                              {keys.mutable_data_ptr<float>() + (g * count + b) * s.key_dim,
                               static_cast<std::size_t>(s.key_dim)}));
  line.landmarks.append(keys.to(options_));
}

Status PagedMemory::save_pages(const fs::path& folder) {
  if (!broken_.empty()) return invalid_argument("landmark: this state cannot go on: ", broken_);
  settle();
  EVERLONG_RETURN_IF_ERROR(make_directories(folder));
  for (std::int64_t n = 0; n < sequences(); ++n) {
    Line& line = lines_[static_cast<std::size_t>(n)];
    const std::int64_t numbers[] = {positions()[static_cast<std::size_t>(n)], line.tail_first};
    std::vector<std::byte> extra;
    append_bytes(extra, numbers, sizeof numbers);
    for (const at::Tensor& tail : {line.k.cpu().contiguous(), line.v.cpu().contiguous()})
      append_bytes(extra, tail.const_data_ptr(), tail.nbytes());
    EVERLONG_RETURN_IF_ERROR(line.pages.save(state_file(folder, n), extra));
  }
  return {};
}

Status PagedMemory::restore_pages(const fs::path& folder) {
  const PageShape& s = store_->shape();
  std::vector<Line> lines;
  std::vector<std::int64_t> at;
  for (std::int64_t n = 0; n < sequences(); ++n) {
    const fs::path path = state_file(folder, n);
    std::vector<std::byte> extra;
    EVERLONG_ASSIGN(auto pages,
                    BlockPages::restore(store_, path, kept_blocks(shape_.retrieval), &extra));
    std::int64_t numbers[2] = {-1, -1};
    if (extra.size() >= sizeof numbers) std::memcpy(numbers, extra.data(), sizeof numbers);
    const std::int64_t rows = numbers[0] - numbers[1], width = s.kv_heads * s.element();
    const bool fits =
        numbers[1] >= 0 && rows >= 0 && numbers[0] / s.block == pages.end() &&
        rows <= (shape_.retrieval.window + 1) * s.block &&
        static_cast<std::int64_t>(extra.size()) ==
            static_cast<std::int64_t>(sizeof numbers) + rows * width * (s.key_dim + s.value_dim);
    if (!fits)
      return corrupt(path.string(), ": the incomplete block does not fit the ", pages.end(),
                     " complete ones, or was saved with another window");
    const std::byte* next = extra.data() + sizeof numbers;
    const auto take = [&](std::int64_t dim) {
      const at::Tensor x = at::empty({s.kv_heads, rows, dim}, options_.device(at::kCPU));
      if (x.numel() > 0) std::memcpy(x.mutable_data_ptr(), next, x.nbytes());
      next += x.nbytes();
      return x.to(options_.device());
    };
    at::Tensor k = take(s.key_dim), v = take(s.value_dim);
    lines.push_back({std::move(pages), std::move(k), std::move(v), numbers[1]});
    copy_landmarks(lines.back());
    at.push_back(numbers[0]);
  }
  lines_ = std::move(lines);
  if (pool_) pool_->clear();
  positions() = at;
  given_.clear();
  broken_.clear();
  return {};
}

}  // namespace everlong::landmark
