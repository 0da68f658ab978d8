// The public headers for the sources behind them: here everlong::v1::Stream is the public one and
// everlong::Stream the inner one. Status and exceptions of the inside become public failures.
#pragma once
#define EVERLONG_LIBRARY_SOURCE
#include <c10/util/Exception.h>
#include <everlong/model.h>
#include <everlong/stream.h>
#include <everlong/train.h>

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "core/status.h"

namespace everlong::v1 {

inline Status to_public(const everlong::Status& status) {
  if (status.ok()) return {};
  const auto code = [&] {
    switch (status.code()) {
      case everlong::StatusCode::kInvalidArgument:
        return StatusCode::kInvalidArgument;
      case everlong::StatusCode::kUnsupported:
        return StatusCode::kUnsupported;
      case everlong::StatusCode::kNotFound:
        return StatusCode::kNotFound;
      case everlong::StatusCode::kCorrupt:
        return StatusCode::kCorrupt;
      case everlong::StatusCode::kIo:
        return StatusCode::kIo;
      case everlong::StatusCode::kInterrupted:
        return StatusCode::kInterrupted;
      case everlong::StatusCode::kOk:
        break;
    }
    return StatusCode::kInternal;
  }();
  return {code, status.message()};
}

// Runs `body`, which returns a public Status or Result; nothing that it throws gets out.
template <class Body>
auto guarded(const Body& body) noexcept -> decltype(body()) {
  try {
    return body();
  } catch (const c10::OutOfMemoryError& error) {
    return Status(StatusCode::kOutOfMemory,
                  std::string("the device is out of memory: ") + error.what_without_backtrace());
  } catch (const c10::Error& error) {
    return Status(StatusCode::kInternal, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::kOutOfMemory, "the machine is out of memory");
  } catch (const std::exception& error) {
    return Status(StatusCode::kInternal, error.what());
  }
}

}  // namespace everlong::v1
