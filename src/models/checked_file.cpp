#include "models/checked_file.h"

#include <ATen/ATen.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstdio>
#include <nlohmann/json.hpp>

namespace everlong {
namespace {

constexpr const char* kFormatKey = "format";
constexpr const char* kChecksumKey = "checksum";

// Of the metadata but for the checksum, then of the tensors, both by name.
class ContentChecksum {
 public:
  ContentChecksum() { XXH3_64bits_reset(&state_); }
  void metadata(const std::map<std::string, std::string>& entries) {
    for (const auto& [key, value] : entries) {
      if (key == kChecksumKey) continue;
      text(key);
      text(value);
    }
  }
  void tensor(const std::string& name, DType dtype, const std::vector<std::int64_t>& shape,
              const void* data, std::size_t bytes) {
    text(name);
    text(info(dtype).safetensors_name);
    text(nlohmann::json(shape).dump());
    if (bytes > 0) XXH3_64bits_update(&state_, data, bytes);
  }
  std::string digits() const {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx",
                  static_cast<unsigned long long>(XXH3_64bits_digest(&state_)));
    return text;
  }

 private:
  void text(std::string_view value) {  // and the zero byte that ends it
    XXH3_64bits_update(&state_, value.data(), value.size());
    XXH3_64bits_update(&state_, "", 1);
  }
  XXH3_state_t state_;
};

}  // namespace

Status write_checked(const fs::path& path, const TensorFile& content, const std::string& format) {
  const at::NoGradGuard off;
  TensorFile file;
  file.metadata = content.metadata;
  file.metadata[kFormatKey] = format;
  ContentChecksum checksum;
  checksum.metadata(file.metadata);
  for (const auto& [name, tensor] : content.tensors) {
    const at::Tensor plain = tensor.detach().cpu().contiguous();
    EVERLONG_ASSIGN(const DType dtype, to_dtype(plain.scalar_type()));
    checksum.tensor(name, dtype, plain.sizes().vec(), plain.const_data_ptr(), plain.nbytes());
    file.tensors[name] = plain;
  }
  file.metadata[kChecksumKey] = checksum.digits();
  return save_tensors(path, file.tensors, file.metadata);
}

Result<TensorFile> read_checked(const fs::path& path, const std::string& format,
                                std::string_view kind) {
  EVERLONG_ASSIGN(const auto file, SafetensorsFile::open(path));
  TensorFile content;
  content.metadata = file.metadata();
  if (const std::string given = content.metadata[kFormatKey]; given != format)
    return corrupt(path.string(), ": is not ", kind, " of this version: its format is \"", given,
                   "\"; known: ", format);
  ContentChecksum checksum;
  checksum.metadata(content.metadata);
  for (const auto& [name, entry] : file.tensors()) {
    checksum.tensor(name, entry.dtype, entry.shape, entry.bytes.data(), entry.bytes.size());
    content.tensors[name] = to_tensor(entry);
  }
  if (const std::string stated = content.metadata[kChecksumKey]; stated != checksum.digits())
    return corrupt(path.string(), ": is damaged: its checksum is ", checksum.digits(),
                   ", and it says \"", stated, "\"");
  // The tensors' own checksums are no part of that one: a digit of theirs may be what is damaged.
  for (const auto& [name, entry] : file.tensors()) EVERLONG_RETURN_IF_ERROR(file.verify(name));
  content.metadata.erase(kFormatKey);
  content.metadata.erase(kChecksumKey);
  return content;
}

}  // namespace everlong
