#include "core/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the cap of the published reader
constexpr std::string_view kMetadata = "__metadata__";

static_assert(std::endian::native == std::endian::little,
              "tensor data are written as they lie in memory");

// A JSON object keeps one of two members of the same name; this remembers that there were two.
class DuplicateNames {
 public:
  bool operator()(int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) open_.emplace_back();
    if (event == json::parse_event_t::object_end) open_.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      if (!open_.back().insert(name).second && !found_) {
        found_ = true;
        name_ = name;
      }
    }
    return true;
  }
  bool found() const { return found_; }
  const std::string& name() const { return name_; }

 private:
  std::vector<std::set<std::string>> open_;
  bool found_ = false;
  std::string name_;
};

std::string shape_text(const std::vector<std::int64_t>& shape) { return json(shape).dump(); }

// Elements times bytes of one, or a failure when the product leaves 64 bits.
Result<std::uint64_t> data_bytes(const TensorEntry& entry) {
  std::uint64_t total = info(entry.dtype).bytes;
  for (const std::int64_t extent : entry.shape) {
    if (extent < 0) return corrupt("shape ", shape_text(entry.shape), " has a negative extent");
    if (__builtin_mul_overflow(total, static_cast<std::uint64_t>(extent), &total))
      return corrupt("shape ", shape_text(entry.shape), " does not fit in 64-bit bytes");
  }
  return total;
}

struct Range {
  std::uint64_t begin = 0, end = 0;
  std::string name;
};

// A list of whole numbers >= 0 that fit in int64.
bool is_list_of_counts(const json& value) {
  return value.is_array() && std::ranges::all_of(value, [](const json& item) {
           return item.is_number_unsigned() && item.get<std::uint64_t>() <= INT64_MAX;
         });
}

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
  EVERLONG_ASSIGN(const std::uint64_t needed, data_bytes(entry));
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
  // The parser would take a zero byte for the end of the text and overlook what follows.
  if (std::memchr(text, 0, header_bytes) != nullptr)
    return corrupt("the header is not a valid JSON object: it holds a zero byte");
  DuplicateNames duplicates;
  const json header =
      json::parse(text, text + header_bytes, std::ref(duplicates), /*allow_exceptions=*/false);
  if (!header.is_object()) return corrupt("the header is not a valid JSON object");
  if (duplicates.found()) return corrupt("the header holds \"", duplicates.name(), "\" twice");

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
  return content;
}

Result<SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  EVERLONG_ASSIGN(auto file, MappedFile::open(path));
  auto content = parse_safetensors(file.bytes());
  if (!content.ok()) return content.status().at(path.string());
  return SafetensorsFile(std::move(file), *std::move(content));
}

Status write_safetensors(const fs::path& path, const std::map<std::string, TensorEntry>& tensors,
                         const std::map<std::string, std::string>& metadata) {
  // Wide elements first: with the header padded to 8 bytes every tensor then starts at a multiple
  // of its element.
  std::vector<const std::pair<const std::string, TensorEntry>*> order;
  for (const auto& item : tensors) order.push_back(&item);
  std::ranges::stable_sort(order, std::greater{},
                           [](const auto* item) { return info(item->second.dtype).bytes; });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[std::string(kMetadata)] = metadata;
  std::uint64_t offset = 0;
  for (const auto* item : order) {
    const auto& [name, entry] = *item;
    if (name == kMetadata)
      return invalid_argument(path.string(), ": no tensor can be called ", kMetadata);
    const auto needed = data_bytes(entry);
    if (!needed.ok())
      return invalid_argument(path.string(), ": tensor \"", name,
                              "\": ", needed.status().message());
    if (entry.bytes.size() != *needed)
      return invalid_argument(path.string(), ": tensor \"", name, "\": shape ",
                              shape_text(entry.shape), " needs ", *needed, " bytes; ",
                              entry.bytes.size(), " were given");
    header[name] = {{"dtype", info(entry.dtype).safetensors_name},
                    {"shape", entry.shape},
                    {"data_offsets", {offset, offset + *needed}}};
    offset += *needed;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    return invalid_argument(path.string(), ": a tensor name or a metadata string is not UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t header_bytes = text.size();
  if (header_bytes > kMaxHeaderBytes)
    return invalid_argument(path.string(), ": the header needs ", header_bytes, " bytes; at most ",
                            kMaxHeaderBytes);

  EVERLONG_ASSIGN(auto file, AtomicFile::create(path));
  EVERLONG_RETURN_IF_ERROR(file.write(std::as_bytes(std::span(&header_bytes, 1))));
  EVERLONG_RETURN_IF_ERROR(file.write(text));
  for (const auto* item : order) EVERLONG_RETURN_IF_ERROR(file.write(item->second.bytes));
  return file.commit();
}

}  // namespace everlong
