// safetensors: the one container for weights, streaming state and golden cases.
//
// Layout: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets},
// "__metadata__": {string: string}}, padded with spaces to 8 bytes, then the data, C order, without
// gaps or overlaps. docs/formats.md.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/files.h"

namespace everlong {

struct TensorEntry {
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
  // Into the mapped file (reader) or the caller's memory (writer). A file of another writer may
  // start a tensor at any byte, so readers copy before they look at elements.
  std::span<const std::byte> bytes;
};

struct SafetensorsContent {
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> metadata;  // without the checksums
  // tensor_checksum() of every tensor as the file states it; empty where it states none, as files
  // of other programs do.
  std::map<std::string, std::uint64_t> checksums;
};

// XXH3-64 of name, dtype, shape and data, as docs/formats.md ("Checksums of tensors") says.
std::uint64_t tensor_checksum(const std::string& name, const TensorEntry& entry);

// Elements times bytes of one; fails where that leaves 64 bits or an extent is negative.
Result<std::uint64_t> tensor_bytes(DType dtype, const std::vector<std::int64_t>& shape);

// Checks a whole file in memory: every size, offset, name and overlap. Entries point into `bytes`.
Result<SafetensorsContent> parse_safetensors(std::span<const std::byte> bytes);

// A mapped file that passed parse_safetensors: only the header was read. Entries point into the map
// and live as long as the object.
class SafetensorsFile {
 public:
  static Result<SafetensorsFile> open(const fs::path& path);

  const std::map<std::string, TensorEntry>& tensors() const { return content_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return content_.metadata; }
  // Whether the file states checksums, which everything that write_safetensors() wrote does.
  bool has_checksums() const { return !content_.checksums.empty(); }
  // Reads the whole tensor: kCorrupt where it is not what was written. Nothing is known, and
  // nothing refused, where the file states no checksums. Opening a file verifies no tensor.
  Status verify(const std::string& name) const;
  const fs::path& path() const { return file_.path(); }
  // The pages of `bytes`, read and done with; see MappedFile.
  void release(std::span<const std::byte> bytes) const { file_.release(bytes); }

 private:
  SafetensorsFile(MappedFile file, SafetensorsContent content)
      : file_(std::move(file)), content_(std::move(content)) {}
  MappedFile file_;
  SafetensorsContent content_;
};

// Written to a temporary, synced, renamed, with the checksum of every tensor. Refuses a tensor
// whose bytes do not fit its shape, text that is not UTF-8, and metadata of the name that the
// checksums have.
Status write_safetensors(const fs::path& path, const std::map<std::string, TensorEntry>& tensors,
                         const std::map<std::string, std::string>& metadata);

// The same for tensors that are not all in memory: the file is laid out from the plan, then
// `bytes_of` is asked for one tensor after the other, once for each; what it returns need last only
// until it is asked again.
struct TensorPlan {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
};
using TensorBytes = std::function<Result<std::span<const std::byte>>(const std::string& name)>;
Status write_safetensors(const fs::path& path, const std::vector<TensorPlan>& tensors,
                         const std::map<std::string, std::string>& metadata,
                         const TensorBytes& bytes_of);

}  // namespace everlong
