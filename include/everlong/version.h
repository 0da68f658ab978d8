// The version of the library: semantic versioning, https://semver.org. While MAJOR is 0 a new MINOR
// may change the interface; a new PATCH never does.
#pragma once

#define EVERLONG_VERSION_MAJOR 0
#define EVERLONG_VERSION_MINOR 1
#define EVERLONG_VERSION_PATCH 0

// Users write everlong::Stream; the symbols are everlong::v1::Stream. The library's own sources,
// which have an inner Stream beside it, open the namespace without `inline`: same symbols.
#ifdef EVERLONG_LIBRARY_SOURCE
#define EVERLONG_NAMESPACE_BEGIN \
  namespace everlong {           \
  namespace v1 {
#else
#define EVERLONG_NAMESPACE_BEGIN \
  namespace everlong {           \
  inline namespace v1 {
#endif
#define EVERLONG_NAMESPACE_END \
  }                            \
  }

EVERLONG_NAMESPACE_BEGIN

// Of the library that runs, which may be another than the headers were: "0.1.0". Thread safe.
const char* version();
// One line for bug reports: version, commit, build type, compiler, versions of torch and CUDA.
const char* build();

EVERLONG_NAMESPACE_END
