#include "core/safetensors.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "core/strict_json.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the cap of the published reader
constexpr std::string_view kMetadata = "__metadata__";
constexpr const char* kChecksums = "everlong_checksums";  // an entry of the metadata

static_assert(std::endian::native == std::endian::little,
              "tensor data are written as they lie in memory");

std::string shape_text(const std::vector<std::int64_t>& shape) { return json(shape).dump(); }

struct Range {
  std::uint64_t begin = 0, end = 0;
  std::string name;
};

Result<TensorEntry> read_entry(const json& object, std::span<const std::byte> data, Range& range) {
  if (!object.is_object()) return corrupt("is ", object.type_name(), "; an object is needed");
  for (const auto& [key, value] : object.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      return corrupt("member \"", key, "\" is not known; allowed: dtype, shape, data_offsets");
  for (const char* key : {"dtype", "shape", "data_offsets"})
    if (!object.contains(key)) return corrupt("member \"", key, "\" is missing");

  TensorEntry entry;
  const json& dtype = object["dtype"];
  const auto known =
      dtype.is_string() ? dtype_from_safetensors(dtype.get<std::string>()) : std::nullopt;
  if (!known) {
    std::vector<std::string> names;
    for (const auto& about : kDTypes) names.emplace_back(about.safetensors_name);
    return corrupt("dtype ", dtype.dump(), " is not known; allowed: ", join(names, ", "));
  }
  entry.dtype = *known;
  const json& shape = object["shape"];
  if (!is_list_of_counts(shape))
    return corrupt("shape is not a list of whole numbers >= 0: ", shape.dump());
  entry.shape = shape.get<std::vector<std::int64_t>>();
  const json& offsets = object["data_offsets"];
  if (!is_list_of_counts(offsets) || offsets.size() != 2)
    return corrupt("data_offsets is not a pair of whole numbers >= 0: ", offsets.dump());
  range.begin = offsets[0].get<std::uint64_t>();
  range.end = offsets[1].get<std::uint64_t>();
  if (range.begin > range.end || range.end > data.size())
    return corrupt("data_offsets ", offsets.dump(), " do not lie in order within the ", data.size(),
                   " bytes of data");
  EVERLONG_ASSIGN(const std::uint64_t needed, tensor_bytes(entry.dtype, entry.shape));
  if (range.end - range.begin != needed)
    return corrupt("data_offsets ", offsets.dump(), " hold ", range.end - range.begin,
                   " bytes; shape ", shape.dump(), " of ", info(entry.dtype).safetensors_name,
                   " needs ", needed);
  entry.bytes = data.subspan(range.begin, range.end - range.begin);
  return entry;
}

Status read_metadata(const json& object, std::map<std::string, std::string>& metadata) {
  if (!object.is_object())
    return corrupt(kMetadata, " is ", object.type_name(), "; an object of strings is needed");
  for (const auto& [key, value] : object.items()) {
    if (!value.is_string())
      return corrupt(kMetadata, ".", key, " is ", value.type_name(), "; a string is needed");
    metadata[key] = value.get<std::string>();
  }
  return {};
}

std::string checksum_digits(std::uint64_t checksum) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
  return text;
}

// Out of the metadata, where they are: a JSON object in a string, as metadata are strings. Every
// tensor has one, and nothing else does.
Status take_checksums(SafetensorsContent& content) {
  const auto found = content.metadata.find(kChecksums);
  if (found == content.metadata.end()) return {};
  const auto object = parse_strict_object(found->second, kChecksums);
  if (!object.ok()) return object.status();
  for (const auto& [name, value] : object->items()) {
    const std::string digits = value.is_string() ? value.get<std::string>() : "";
    std::uint64_t checksum = 0;
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), checksum, 16);
    if (error != std::errc() || end != digits.data() + digits.size() ||
        digits != checksum_digits(checksum))
      return corrupt(kChecksums, "[\"", name, "\"] = ", value.dump(),
                     "; 16 hexadecimal digits are needed");
    if (!content.tensors.contains(name))
      return corrupt(kChecksums, " names \"", name, "\", which is no tensor of the file");
    content.checksums[name] = checksum;
  }
  for (const auto& [name, entry] : content.tensors)
    if (!content.checksums.contains(name))
      return corrupt("tensor \"", name, "\" has no checksum in ", kChecksums,
                     ", which states those of others");
  content.metadata.erase(found);
  return {};
}

// The tensors, in the order of their data, must follow one another from the first byte to the last.
Status check_cover(std::vector<Range>& ranges, std::uint64_t data_size) {
  std::ranges::sort(ranges, {},
                    [](const Range& range) { return std::pair(range.begin, range.end); });
  std::uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered)
      return corrupt("tensor \"", range.name, "\" starts at byte ", range.begin,
                     " of the data; byte ", covered,
                     range.begin < covered ? " is the first free one: tensors overlap"
                                           : " comes next: there is a hole");
    covered = range.end;
  }
  if (covered != data_size)
    return corrupt("the tensors end at byte ", covered, " of ", data_size,
                   " bytes of data: the rest belongs to none");
  return {};
}

}  // namespace

Result<std::uint64_t> tensor_bytes(DType dtype, const std::vector<std::int64_t>& shape) {
  std::uint64_t total = info(dtype).bytes;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return corrupt("shape ", shape_text(shape), " has a negative extent");
    if (__builtin_mul_overflow(total, static_cast<std::uint64_t>(extent), &total))
      return corrupt("shape ", shape_text(shape), " does not fit in 64-bit bytes");
  }
  return total;
}

std::uint64_t tensor_checksum(const std::string& name, const TensorEntry& entry) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const auto add = [&](std::string_view text) {  // and the zero byte that ends it
    XXH3_64bits_update(&state, text.data(), text.size());
    XXH3_64bits_update(&state, "", 1);
  };
  add(name);
  add(info(entry.dtype).safetensors_name);
  add(shape_text(entry.shape));
  if (!entry.bytes.empty()) XXH3_64bits_update(&state, entry.bytes.data(), entry.bytes.size());
  return XXH3_64bits_digest(&state);
}

Result<SafetensorsContent> parse_safetensors(std::span<const std::byte> bytes) {
  std::uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes)
    return corrupt(bytes.size(),
                   " bytes are too short for the 8-byte header length of a safetensors file");
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  if (header_bytes > kMaxHeaderBytes)
    return corrupt("header length ", header_bytes, " exceeds ", kMaxHeaderBytes,
                   ": not a safetensors file, or a broken one");
  if (header_bytes > bytes.size() - sizeof header_bytes)
    return corrupt("header length ", header_bytes, " runs past the end of the file, ", bytes.size(),
                   " bytes: it was cut short, or is no safetensors file");
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof header_bytes;
  const auto data = bytes.subspan(sizeof header_bytes + header_bytes);

  if (header_bytes == 0 || *text != '{')
    return corrupt("the header does not start with \"{\": not a safetensors file");
  EVERLONG_ASSIGN(const json header, parse_strict_object({text, header_bytes}, "header"));

  SafetensorsContent content;
  std::vector<Range> ranges;
  for (const auto& [name, object] : header.items()) {
    if (name == kMetadata) {
      EVERLONG_RETURN_IF_ERROR(read_metadata(object, content.metadata));
      continue;
    }
    Range range;
    auto entry = read_entry(object, data, range);
    if (!entry.ok()) return entry.status().at(cat("tensor \"", name, "\""));
    range.name = name;
    ranges.push_back(std::move(range));
    content.tensors[name] = *std::move(entry);
  }
  EVERLONG_RETURN_IF_ERROR(check_cover(ranges, data.size()));
  EVERLONG_RETURN_IF_ERROR(take_checksums(content));
  return content;
}

Result<SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  EVERLONG_ASSIGN(auto file, MappedFile::open(path));
  auto content = parse_safetensors(file.bytes());
  if (!content.ok()) return content.status().at(path.string());
  return SafetensorsFile(std::move(file), *std::move(content));
}

Status SafetensorsFile::verify(const std::string& name) const {
  const auto stated = content_.checksums.find(name);
  if (stated == content_.checksums.end()) return {};
  const std::uint64_t checksum = tensor_checksum(name, content_.tensors.at(name));
  if (checksum == stated->second) return {};
  return corrupt(path().string(), ": tensor \"", name, "\" is damaged: its checksum is ",
                 checksum_digits(checksum), ", and the file says ", checksum_digits(stated->second),
                 ". Fetch or make the file again");
}

namespace {

// The header as the file begins with it: its length, JSON, spaces to a multiple of 8. All
// checksums have as many digits, so the header of a file has one length whatever they are.
Result<std::string> header_text(const std::vector<const TensorPlan*>& tensors,
                                std::map<std::string, std::string> metadata,
                                const std::map<std::string, std::uint64_t>& checksums) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::string text;
  try {
    if (!tensors.empty()) {
      nlohmann::ordered_json digits = nlohmann::ordered_json::object();
      for (const auto* tensor : tensors) {
        const auto known = checksums.find(tensor->name);
        digits[tensor->name] = checksum_digits(known == checksums.end() ? 0 : known->second);
      }
      metadata[kChecksums] = digits.dump();
    }
    if (!metadata.empty()) header[std::string(kMetadata)] = metadata;
    std::uint64_t offset = 0;
    for (const auto* tensor : tensors) {
      EVERLONG_ASSIGN(const std::uint64_t bytes, tensor_bytes(tensor->dtype, tensor->shape));
      header[tensor->name] = {{"dtype", info(tensor->dtype).safetensors_name},
                              {"shape", tensor->shape},
                              {"data_offsets", {offset, offset + bytes}}};
      offset += bytes;
    }
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    return invalid_argument("a tensor name or a metadata string is not UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  if (length > kMaxHeaderBytes)
    return invalid_argument("the header needs ", length, " bytes; at most ", kMaxHeaderBytes);
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text;
}

}  // namespace

Status write_safetensors(const fs::path& path, const std::vector<TensorPlan>& tensors,
                         const std::map<std::string, std::string>& metadata,
                         const TensorBytes& bytes_of) {
  // Wide elements first: with the header padded to 8 bytes every tensor then starts at a multiple
  // of its element.
  std::vector<const TensorPlan*> order;
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::ranges::stable_sort(order, std::greater{},
                           [](const auto* tensor) { return info(tensor->dtype).bytes; });

  if (metadata.contains(kChecksums))
    return invalid_argument(path.string(), ": metadata cannot have \"", kChecksums,
                            "\": it is written with the tensors");
  std::set<std::string_view> names;
  for (const auto* tensor : order) {
    const std::string& name = tensor->name;
    if (name == kMetadata)
      return invalid_argument(path.string(), ": no tensor can be called ", kMetadata);
    if (const auto needed = tensor_bytes(tensor->dtype, tensor->shape); !needed.ok())
      return invalid_argument(path.string(), ": tensor \"", name,
                              "\": ", needed.status().message());
    if (!names.insert(name).second)
      return invalid_argument(path.string(), ": tensor \"", name, "\" is given twice");
  }
  const auto first = header_text(order, metadata, {});
  if (!first.ok()) return first.status().at(path.string());

  EVERLONG_ASSIGN(auto file, AtomicFile::create(path));
  EVERLONG_RETURN_IF_ERROR(file.write(*first));
  std::map<std::string, std::uint64_t> checksums;  // known when the data are written, not before
  for (const auto* tensor : order) {
    EVERLONG_ASSIGN(const auto bytes, bytes_of(tensor->name));
    if (bytes.size() != *tensor_bytes(tensor->dtype, tensor->shape))
      return invalid_argument(path.string(), ": tensor \"", tensor->name, "\": shape ",
                              shape_text(tensor->shape), " needs ",
                              *tensor_bytes(tensor->dtype, tensor->shape), " bytes; ", bytes.size(),
                              " were given");
    EVERLONG_RETURN_IF_ERROR(file.write(bytes));
    checksums[tensor->name] = tensor_checksum(tensor->name, {tensor->dtype, tensor->shape, bytes});
  }
  const auto last = header_text(order, metadata, checksums);
  if (!last.ok()) return last.status().at(path.string());
  EVERLONG_RETURN_IF_ERROR(file.write_over(0, *last));
  return file.commit();
}

Status write_safetensors(const fs::path& path, const std::map<std::string, TensorEntry>& tensors,
                         const std::map<std::string, std::string>& metadata) {
  std::vector<TensorPlan> plan;
  for (const auto& [name, entry] : tensors) plan.push_back({name, entry.dtype, entry.shape});
  return write_safetensors(path, plan, metadata,
                           [&](const std::string& name) -> Result<std::span<const std::byte>> {
                             return tensors.at(name).bytes;
                           });
}

}  // namespace everlong
