#include <everlong_build_info.h>

#include "core/text.h"
#include "library/model_impl.h"
#include "models/checkpoint.h"
#include "ops/runtime.h"

namespace everlong::v1 {

const char* version() { return build_info::kVersion; }

const char* build() {
  static const std::string line =
      cat("everlong ", build_info::kVersion, " (", build_info::kCommit, "), ",
          build_info::kBuildType, ", ", build_info::kCompiler, ", torch ", build_info::kTorch,
          *build_info::kCuda == '\0' ? "" : cat(", CUDA ", build_info::kCuda));
  return line.c_str();
}

Result<Model> Model::open(const std::string& folder, const ModelOptions& options) {
  const auto read = [&]() -> everlong::Result<std::shared_ptr<Impl>> {
    EVERLONG_RETURN_IF_ERROR(set_threads(options.threads));
    EVERLONG_ASSIGN(const auto device, pick_device(options.device));
    EVERLONG_ASSIGN(const auto dtype, pick_dtype(options.dtype, device));
    auto impl = std::make_shared<Impl>();
    EVERLONG_ASSIGN(impl->decoder, load_model(folder, device, dtype));
    impl->decoder->eval();
    EVERLONG_ASSIGN(impl->tokenizer, make_tokenizer(impl->decoder->config().tokenizer, folder));
    impl->device = device.str();
    impl->dtype = dtype_name(dtype);
    return impl;
  };
  return guarded([&]() -> Result<Model> {
    auto impl = read();
    if (!impl.ok()) return to_public(impl.status());
    return Model(*std::move(impl));
  });
}

std::int64_t Model::parameters() const { return impl_->decoder->parameter_count(); }
std::int64_t Model::vocab_size() const { return impl_->decoder->config().vocab_size; }
const std::vector<std::string>& Model::layers() const {
  return impl_->decoder->config().layer_types;
}
const std::string& Model::device() const { return impl_->device; }
const std::string& Model::dtype() const { return impl_->dtype; }

std::vector<std::int32_t> Model::encode(std::string_view text) const {
  return impl_->tokenizer->encode(text);
}
std::string Model::decode(std::span<const std::int32_t> ids) const {
  return impl_->tokenizer->decode(ids);
}
std::int32_t Model::begin_of_document() const { return impl_->tokenizer->bod(); }
std::int32_t Model::end_of_document() const { return impl_->tokenizer->eod(); }

}  // namespace everlong::v1
