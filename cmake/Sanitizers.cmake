# EVERLONG_SANITIZE=address,undefined (or thread) on every target. Torch itself is clean under both; no suppressions.
if(EVERLONG_SANITIZE)
  string(REPLACE "," ";" sanitizers "${EVERLONG_SANITIZE}")
  foreach(sanitizer ${sanitizers})
    if(NOT sanitizer MATCHES "^(address|undefined|leak|thread)$")
      message(FATAL_ERROR "EVERLONG_SANITIZE=${EVERLONG_SANITIZE}: '${sanitizer}' is not known; allowed: address, undefined, leak, thread")
    endif()
  endforeach()
  set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1 -fno-omit-frame-pointer")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${EVERLONG_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>)
  add_link_options(-fsanitize=${EVERLONG_SANITIZE})
endif()
