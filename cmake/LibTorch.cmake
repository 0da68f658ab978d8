# LibTorch from a Python wheel, CPU libraries only: target everlong_torch. The CUDA half of torch is opened at run time,
# so one binary serves machines with and without a GPU. find_package(Torch) is not used: it drags CUDA in at configure time.
#   LIBTORCH_ROOT   folder with include/ and lib/; default: the environment's, else torch of .venv, else of python3
set(EVERLONG_TORCH_VERSION 2.11.0)
set(LIBTORCH_ROOT "$ENV{LIBTORCH_ROOT}" CACHE PATH "LibTorch: the folder that holds include/ and lib/")

set(torch_root "${LIBTORCH_ROOT}")
if(NOT torch_root)
  foreach(python ${PROJECT_SOURCE_DIR}/.venv/bin/python python3)
    # Looks the folder up without importing torch, which a wheel without its Python dependencies would refuse.
    execute_process(
      COMMAND ${python} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(failed STREQUAL "0")
      break()
    endif()
    set(torch_root "")
  endforeach()
endif()
set(torch_version_header ${torch_root}/include/torch/headeronly/version.h)
if(NOT torch_root OR NOT EXISTS ${torch_version_header})
  message(FATAL_ERROR "LibTorch ${EVERLONG_TORCH_VERSION} was not found (looked at '${torch_root}'). Run `make setup`, or give -DLIBTORCH_ROOT=<folder with include/ and lib/>.")
endif()

file(STRINGS ${torch_version_header} version_lines REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
list(TRANSFORM version_lines REPLACE "^.* " "")
list(JOIN version_lines "." torch_version)
if(NOT torch_version VERSION_EQUAL EVERLONG_TORCH_VERSION)
  message(FATAL_ERROR "LibTorch ${torch_version} in ${torch_root}: Everlong is written for ${EVERLONG_TORCH_VERSION}. Run `make setup`, or give -DLIBTORCH_ROOT=<that version>.")
endif()
message(STATUS "LibTorch ${torch_version} in ${torch_root}")

set(torch_libraries ${torch_root}/lib/libtorch_cpu.so ${torch_root}/lib/libc10.so)
if(EXISTS ${torch_root}/lib/libgomp.so.1)
  list(APPEND torch_libraries ${torch_root}/lib/libgomp.so.1)  # torch's own OpenMP; a second one would make a second pool
endif()
file(GLOB torch_rpath LIST_DIRECTORIES true ${torch_root}/../nvidia/*/lib)
list(TRANSFORM torch_rpath REPLACE "/torch/\\.\\./" "/")
list(PREPEND torch_rpath ${torch_root}/lib)
list(JOIN torch_rpath ":" torch_rpath)

add_library(everlong_torch INTERFACE)
target_include_directories(everlong_torch SYSTEM INTERFACE
  ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
target_link_libraries(everlong_torch INTERFACE ${torch_libraries})
# An RPATH and not a RUNPATH: it also serves what torch's libraries, and the CUDA half opened later, ask for.
target_link_options(everlong_torch INTERFACE
  "LINKER:--disable-new-dtags,-rpath,${torch_rpath},-rpath-link,${torch_rpath}")
# at::parallel_for is a header template: in a file compiled without OpenMP it silently runs on one thread.
target_compile_options(everlong_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)

# One precompiled header for all that includes torch.
set(everlong_torch_pch "")
if(EVERLONG_PCH)
  file(WRITE ${CMAKE_BINARY_DIR}/generated/torch_pch.cpp.new "// Carries the precompiled header of cmake/torch_pch.h.\n")
  file(COPY_FILE ${CMAKE_BINARY_DIR}/generated/torch_pch.cpp.new ${CMAKE_BINARY_DIR}/generated/torch_pch.cpp ONLY_IF_DIFFERENT)
  add_library(everlong_torch_pch OBJECT ${CMAKE_BINARY_DIR}/generated/torch_pch.cpp)
  target_link_libraries(everlong_torch_pch PRIVATE everlong_options everlong_torch)
  target_precompile_headers(everlong_torch_pch PRIVATE ${PROJECT_SOURCE_DIR}/cmake/torch_pch.h)
  if(CCACHE_PROGRAM)
    target_compile_options(everlong_torch INTERFACE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
  endif()
endif()
