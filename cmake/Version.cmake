# Version and commit for `everlong --version`, bench records and checkpoints: #include "everlong_build_info.h".
# The header never changes; the commit is looked up at each build and recompiles one small file, only when it changed.
if(CMAKE_SCRIPT_MODE_FILE)  # at build time: cmake -DSOURCE_DIR= -DOUT= -P Version.cmake
  set(commit unknown)
  find_program(GIT git)
  if(GIT AND EXISTS ${SOURCE_DIR}/.git)
    execute_process(COMMAND ${GIT} -C ${SOURCE_DIR} rev-parse --short=12 HEAD
      OUTPUT_VARIABLE hash OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(failed STREQUAL "0")
      set(commit ${hash})
      execute_process(COMMAND ${GIT} -C ${SOURCE_DIR} --no-optional-locks diff --quiet HEAD ERROR_QUIET RESULT_VARIABLE changed)
      if(NOT changed STREQUAL "0")
        string(APPEND commit "-dirty")
      endif()
    endif()
  endif()
  configure_file(${SOURCE_DIR}/cmake/build_info.cpp.in ${OUT} @ONLY)  # writes only what differs
  return()
endif()

set(build_info_cpp ${CMAKE_BINARY_DIR}/generated/build_info.cpp)
add_custom_target(everlong_commit BYPRODUCTS ${build_info_cpp}
  COMMAND ${CMAKE_COMMAND} -DSOURCE_DIR=${PROJECT_SOURCE_DIR} -DOUT=${build_info_cpp}
          -DVERSION=${PROJECT_VERSION} -DBUILD_TYPE=${CMAKE_BUILD_TYPE} -DTORCH=${torch_version}
          -DCUDA=${EVERLONG_CUDA_VERSION} "-DCOMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
          -P ${CMAKE_CURRENT_LIST_FILE}
  COMMENT "Looking up the commit" VERBATIM)
add_library(everlong_build_info STATIC ${build_info_cpp})
add_dependencies(everlong_build_info everlong_commit)
configure_file(${PROJECT_SOURCE_DIR}/cmake/build_info.h.in ${CMAKE_BINARY_DIR}/generated/include/everlong_build_info.h COPYONLY)
target_include_directories(everlong_build_info PUBLIC ${CMAKE_BINARY_DIR}/generated/include)
