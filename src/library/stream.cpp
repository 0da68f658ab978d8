#include "session/stream.h"

#include "core/text.h"
#include "library/model_impl.h"

namespace everlong::v1 {
namespace {

constexpr std::int64_t kMaxChunk = std::int64_t{1} << 24;

}  // namespace

struct [[gnu::visibility("hidden")]] Sampler::Impl {
  everlong::Sampler sampler;
};

Sampler::Sampler(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;
Sampler::~Sampler() = default;

Result<Sampler> Sampler::create(const SamplingOptions& options) {
  return guarded([&]() -> Result<Sampler> {
    const SamplingParams params{
        options.temperature,        options.top_k,          options.top_p, options.min_p,
        options.repetition_penalty, options.penalty_window, options.seed};
    if (const auto status = validate(params); !status.ok()) return to_public(status);
    return Sampler(std::make_unique<Impl>(Impl{everlong::Sampler(params)}));
  });
}

void Sampler::saw(std::int32_t token) { impl_->sampler.saw(token); }
std::string Sampler::save() const { return impl_->sampler.save(); }
Status Sampler::restore(const std::string& text) {
  return guarded([&] { return to_public(impl_->sampler.restore(text)); });
}

struct [[gnu::visibility("hidden")]] Stream::Impl {
  Model model;
  everlong::Stream stream;
};

Stream::Stream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;
Stream::~Stream() = default;

Result<Stream> Stream::create(const Model& model, std::int64_t chunk) {
  if (chunk < 1 || chunk > kMaxChunk)
    return Status(StatusCode::kInvalidArgument,
                  cat("a stream's chunk of ", chunk, " tokens; 1 to ", kMaxChunk, " are possible"));
  return guarded([&]() -> Result<Stream> {
    return Stream(
        std::make_unique<Impl>(Impl{model, everlong::Stream(model.impl_->decoder, chunk)}));
  });
}

Status Stream::feed(std::span<const std::int32_t> tokens) {
  return guarded([&] { return to_public(impl_->stream.feed(tokens)); });
}

Result<std::vector<float>> Stream::score(std::span<const std::int32_t> tokens) {
  return guarded([&]() -> Result<std::vector<float>> {
    auto scores = impl_->stream.score(tokens);
    if (!scores.ok()) return to_public(scores.status());
    return *std::move(scores);
  });
}

std::span<const float> Stream::logits() const { return impl_->stream.logits(); }

Result<std::int32_t> Stream::generate(Sampler& sampler) {
  return guarded([&]() -> Result<std::int32_t> {
    const auto token = impl_->stream.generate(sampler.impl_->sampler);
    if (!token.ok()) return to_public(token.status());
    return *token;
  });
}

std::int64_t Stream::position() const { return impl_->stream.position(); }
std::int64_t Stream::state_bytes() const { return impl_->stream.state_bytes(); }
std::int64_t Stream::state_bytes_bound() const { return impl_->stream.state_bytes_bound(); }
const Model& Stream::model() const { return impl_->model; }

Status Stream::reset() {
  return guarded([&] {
    impl_->stream.reset();
    return Status();
  });
}

Result<Stream> Stream::fork() const {
  return guarded([&]() -> Result<Stream> {
    return Stream(std::make_unique<Impl>(Impl{impl_->model, impl_->stream.clone()}));
  });
}

Status Stream::save(const std::string& file,
                    const std::map<std::string, std::string>& notes) const {
  return guarded([&] { return to_public(impl_->stream.save(file, notes)); });
}

Status Stream::load(const std::string& file, std::map<std::string, std::string>* notes) {
  return guarded([&] { return to_public(impl_->stream.load(file, notes)); });
}

}  // namespace everlong::v1
