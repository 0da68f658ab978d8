#include "mechanisms/landmark/op_sections.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::landmark {

SectionTable make_sections(const at::Tensor& marks_BS, std::int64_t tokens, at::Device device) {
  const at::Tensor marks = marks_BS.to(at::kByte).contiguous();
  const std::int64_t B = marks.size(0), S = marks.size(1);
  const auto* data = marks.const_data_ptr<std::uint8_t>();
  std::vector<std::vector<Section>> rows;
  SectionTable table;
  for (std::int64_t b = 0; b < B; ++b) {
    rows.push_back(sections_of({data + b * S, static_cast<std::size_t>(S)}));
    table.sections = std::max(table.sections, static_cast<std::int64_t>(rows.back().size()));
    for (const Section& section : rows.back())
      table.width = std::max(table.width, section.content());
  }
  const std::int64_t C = table.sections, W = table.width;
  const at::Tensor content = at::full({B, C * W}, kNowhere, at::kLong),
                   landmark = at::full({B, C}, kNowhere, at::kLong),
                   slot = at::zeros({B, S}, at::kLong), empty = at::zeros({B, C}, at::kByte);
  table.seen.assign(static_cast<std::size_t>(tokens), 0);
  for (std::int64_t b = 0; b < B; ++b) {
    auto* of_content = content.mutable_data_ptr<std::int64_t>() + b * C * W;
    auto* of_landmark = landmark.mutable_data_ptr<std::int64_t>() + b * C;
    auto* of_token = slot.mutable_data_ptr<std::int64_t>() + b * S;
    for (std::size_t c = 0; c < rows[static_cast<std::size_t>(b)].size(); ++c) {
      const Section& section = rows[static_cast<std::size_t>(b)][c];
      const auto at = static_cast<std::int64_t>(c);
      for (std::int64_t i = 0; i < section.content(); ++i) {
        of_content[at * W + i] = section.begin + i;
        of_token[section.begin + i] = at * W + i;
      }
      if (section.closed) {
        of_landmark[at] = section.end;
        of_token[section.end] = C * W + at;
        empty.mutable_data_ptr<std::uint8_t>()[b * C + at] = section.content() == 0 ? 1 : 0;
      }
      for (std::int64_t j = std::max(section.begin, S - tokens); j < section.next(); ++j) {
        auto& seen = table.seen[static_cast<std::size_t>(j - (S - tokens))];
        seen = std::max(seen, at + 1);
      }
    }
  }
  table.content = content.to(device);
  table.landmark = landmark.to(device);
  table.slot = slot.to(device);
  table.empty = empty.to(at::kBool).to(device);
  table.query = at::arange(S - tokens, S, at::TensorOptions().dtype(at::kLong).device(device));
  return table;
}

double padding_of(const SectionTable& t) {
  return static_cast<double>(t.sections * (t.width + 1)) /
         static_cast<double>(std::max<std::int64_t>(t.slot.size(1), 1));
}

at::Tensor rows_at(const at::Tensor& x_BSGD, const at::Tensor& positions_BR) {
  const std::int64_t B = x_BSGD.size(0), S = x_BSGD.size(1);
  const at::Tensor nowhere = positions_BR.eq(kNowhere);
  const at::Tensor row = at::arange(B, positions_BR.options()).mul_(S).unsqueeze(1);
  const at::Tensor index = positions_BR.masked_fill(nowhere, 0).add(row).view({-1});
  return x_BSGD.reshape({B * S, x_BSGD.size(2), x_BSGD.size(3)})
      .index_select(0, index)
      .view({B, positions_BR.size(1), x_BSGD.size(2), x_BSGD.size(3)})
      .masked_fill_(nowhere.unsqueeze(-1).unsqueeze(-1), 0)
      .transpose(1, 2)
      .contiguous();
}

at::Tensor keys_from(const at::Tensor& rows_BGRD, const SectionTable& table) {
  const std::int64_t B = rows_BGRD.size(0), G = rows_BGRD.size(1), R = rows_BGRD.size(2),
                     D = rows_BGRD.size(3), S = table.slot.size(1);
  const at::Tensor row = at::arange(B, table.slot.options()).mul_(R).unsqueeze(1);
  return rows_BGRD.transpose(1, 2)
      .reshape({B * R, G, D})
      .index_select(0, table.slot.add(row).view({-1}))
      .view({B, S, G, D});
}

}  // namespace everlong::landmark
