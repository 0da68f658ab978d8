// How failure travels: no exceptions, no exits and no prints below the ops layer.
//
// A message says what was given, what is allowed, what to do.
#pragma once
#include <cassert>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "core/text.h"

namespace everlong {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller's value breaks the contract
  kUnsupported,      // legal in principle, not offered by this room, device or build
  kNotFound,
  kCorrupt,  // bytes from outside break their format
  kIo,
  kInterrupted,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  // The same failure with the place it happened in front: status.at("config.json").
  Status at(std::string_view place) const {
    return ok() ? *this : Status(code_, cat(place, ": ", message_));
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

template <class... Parts>
Status invalid_argument(const Parts&... parts) {
  return {StatusCode::kInvalidArgument, cat(parts...)};
}
template <class... Parts>
Status unsupported(const Parts&... parts) {
  return {StatusCode::kUnsupported, cat(parts...)};
}
template <class... Parts>
Status not_found(const Parts&... parts) {
  return {StatusCode::kNotFound, cat(parts...)};
}
template <class... Parts>
Status corrupt(const Parts&... parts) {
  return {StatusCode::kCorrupt, cat(parts...)};
}
template <class... Parts>
Status io_error(const Parts&... parts) {
  return {StatusCode::kIo, cat(parts...)};
}

// A value, or the reason why there is none. Reading the value of a failure is a programming error.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::move(value)) {}  // NOLINT: implicit on purpose
  Result(Status status) : content_(std::move(status)) { assert(!this->status().ok()); }  // NOLINT

  bool ok() const { return std::holds_alternative<T>(content_); }
  Status status() const { return ok() ? Status() : std::get<Status>(content_); }
  T& value() & { return std::get<T>(content_); }
  const T& value() const& { return std::get<T>(content_); }
  T&& value() && { return std::get<T>(std::move(content_)); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }

 private:
  std::variant<T, Status> content_;
};

}  // namespace everlong

// Returns early with the failure of a Status or Result expression.
#define EVERLONG_RETURN_IF_ERROR(expression)                        \
  do {                                                              \
    if (auto status_ = (expression); !status_.ok()) return status_; \
  } while (false)

#define EVERLONG_CONCAT_(a, b) a##b
#define EVERLONG_CONCAT(a, b) EVERLONG_CONCAT_(a, b)
// Declares `target` from a Result, or returns its failure: EVERLONG_ASSIGN(auto file, open(path)).
#define EVERLONG_ASSIGN(target, expression)               \
  auto EVERLONG_CONCAT(result_, __LINE__) = (expression); \
  if (!EVERLONG_CONCAT(result_, __LINE__).ok())           \
    return EVERLONG_CONCAT(result_, __LINE__).status();   \
  target = std::move(EVERLONG_CONCAT(result_, __LINE__)).value()
