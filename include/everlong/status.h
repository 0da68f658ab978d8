// How failure travels: no function of this library throws or ends the program, except value() and
// check() below where the caller asks for it.
#pragma once
#include <everlong/version.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

EVERLONG_NAMESPACE_BEGIN

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller's value breaks the contract
  kUnsupported,      // legal in principle, not offered by this mechanism, device or build
  kNotFound,
  kCorrupt,  // a file breaks its format
  kIo,
  kInterrupted,  // a callback wished to stop
  kOutOfMemory,  // of the host or the device
  kInternal,     // a fault of the library or of torch: worth a report
};

// Success, or what went wrong: what was given, what is allowed, what to do.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // For programs that prefer exceptions: throws std::runtime_error with the message of a failure.
  void check() const {
    if (!ok()) throw std::runtime_error(message_);
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// A value, or the failure that stands in its place.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::move(value)) {}           // NOLINT: implicit on purpose
  Result(Status failure) : content_(std::move(failure)) {}  // NOLINT: `failure` is not ok()

  bool ok() const { return std::holds_alternative<T>(content_); }
  Status status() const { return ok() ? Status() : std::get<Status>(content_); }
  // Throws std::runtime_error with the message of a failure.
  T& value() & {
    status().check();
    return std::get<T>(content_);
  }
  const T& value() const& {
    status().check();
    return std::get<T>(content_);
  }
  T&& value() && {
    status().check();
    return std::get<T>(std::move(content_));
  }

 private:
  std::variant<T, Status> content_;
};

EVERLONG_NAMESPACE_END
