# Every *_test.cpp is one executable in tests/ and one ctest entry of its name; a room's test carries the room's name.
find_package(GTest REQUIRED)
find_package(rapidcheck QUIET)

set(torch_free everlong_core everlong_kernels everlong_data everlong_shared)

function(everlong_set_test name label)
  set_tests_properties(${name} PROPERTIES LABELS "${label}" ENVIRONMENT "OMP_NUM_THREADS=2;OMP_WAIT_POLICY=passive" TIMEOUT 600)
endfunction()

function(everlong_test_program name library)  # sources in ARGN
  add_executable(${name} ${ARGN})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_compile_definitions(${name} PRIVATE EVERLONG_TEST_DATA="${PROJECT_SOURCE_DIR}/tests")
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(${name} PRIVATE ${library} GTest::gtest_main GTest::gtest $<TARGET_NAME_IF_EXISTS:rapidcheck>)
  if(library IN_LIST torch_free)
    target_compile_options(${name} PRIVATE ${everlong_strict})
  else()
    everlong_torch_target(${name})
  endif()
endfunction()

file(GLOB_RECURSE tests RELATIVE ${PROJECT_SOURCE_DIR} CONFIGURE_DEPENDS
     src/*_test.cpp tests/unit/*_test.cpp tests/integration/*_test.cpp)
foreach(source ${tests})
  cmake_path(GET source STEM name)
  set(label unit)
  if(source MATCHES "^src/mechanisms/([^/]+)/")
    set(room ${CMAKE_MATCH_1})
    if(NOT room IN_LIST mechanisms)
      continue()
    endif()
    if(NOT name MATCHES "^${room}_")
      set(name ${room}_${name})
    endif()
    set(library everlong_layers)
    if(name MATCHES "_(reference|params)_test$")
      set(library everlong_kernels)
    endif()
  elseif(source MATCHES "^src/mechanisms/")
    set(library everlong_layers)
  elseif(source MATCHES "^src/(core|kernels|data|ops|layers|models|session|train|eval)/")
    set(library everlong_${CMAKE_MATCH_1})
  elseif(name STREQUAL "library_test")  # sees the public headers and the shared library alone
    set(library everlong_shared)
  else()
    set(library everlong_all)
  endif()
  if(source MATCHES "^tests/integration/")
    set(label integration)
  endif()
  if(TARGET ${name})
    message(FATAL_ERROR "${source}: there already is a target '${name}'; give the test another name")
  endif()
  everlong_test_program(${name} ${library} ${source})
  if(label STREQUAL "integration")
    target_compile_definitions(${name} PRIVATE EVERLONG_BINARY="${CMAKE_BINARY_DIR}/bin/everlong")
    if(TARGET everlong)
      add_dependencies(${name} everlong)
    endif()
  endif()
  add_test(NAME ${name} COMMAND ${name})
  if(name MATCHES "_cuda(_[a-z0-9_]+)?_test$")  # these skip themselves where there is no GPU
    set(label gpu)
  endif()
  everlong_set_test(${name} ${label})
endforeach()

# Landmark's tier on a GPU; without one these skip themselves.
if(TARGET landmark_device_test)
  add_test(NAME landmark_device_gpu COMMAND landmark_device_test --gtest_filter=*Cuda*)
  everlong_set_test(landmark_device_gpu gpu)
endif()

# What `cmake --install` makes, used from elsewhere: the examples, the package's messages, the exported symbols.
target_compile_definitions(install_test PRIVATE
  EVERLONG_SOURCE_FOLDER="${PROJECT_SOURCE_DIR}" EVERLONG_BUILD_FOLDER="${CMAKE_BINARY_DIR}" EVERLONG_CMAKE="${CMAKE_COMMAND}"
  EVERLONG_COMPILER="${CMAKE_CXX_COMPILER}")
add_dependencies(install_test everlong_shared everlong)
if(EVERLONG_SANITIZE)  # its examples are compiled without
  set_tests_properties(install_test PROPERTIES DISABLED ON)
endif()

# The example on the engine's own libraries: sets of tiles, each read by itself.
add_executable(slide_encoder ${PROJECT_SOURCE_DIR}/examples/slide_encoder.cpp)
set_target_properties(slide_encoder PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/examples)
target_link_libraries(slide_encoder PRIVATE everlong_models)
everlong_torch_target(slide_encoder)
add_test(NAME slide_encoder_example COMMAND slide_encoder)
everlong_set_test(slide_encoder_example integration)

# The same damages again, more of them.
add_test(NAME damaged_files_thousand COMMAND damaged_files_test)
everlong_set_test(damaged_files_thousand slow)
set_property(TEST damaged_files_thousand APPEND PROPERTY ENVIRONMENT "EVERLONG_DAMAGES=1000")

# Two hundred kills; the default run has five.
if(TARGET kill_resume_test)
  add_test(NAME kill_resume_slow COMMAND kill_resume_test --gtest_filter=*Reproduces*)
  everlong_set_test(kill_resume_slow slow)
  set_tests_properties(kill_resume_slow PROPERTIES TIMEOUT 3600
                       ENVIRONMENT "OMP_WAIT_POLICY=passive;EVERLONG_KILLS=200")
endif()

# Any bytes for every reader, and our own threads under ThreadSanitizer: each builds what it needs.
add_test(NAME fuzz COMMAND ${PROJECT_SOURCE_DIR}/tools/fuzz --seconds 20)
add_test(NAME thread_check COMMAND ${PROJECT_SOURCE_DIR}/tools/thread_check)
everlong_set_test(fuzz slow)
everlong_set_test(thread_check slow)
set_tests_properties(fuzz thread_check PROPERTIES TIMEOUT 1800)
find_program(CLANGXX_PROGRAM NAMES clang++ clang++-14)
if(NOT CLANGXX_PROGRAM)
  set_tests_properties(fuzz PROPERTIES DISABLED ON)
endif()

# The laws that every mechanism keeps.
file(GLOB conformance CONFIGURE_DEPENDS tests/conformance/*.cpp)
if(conformance)
  everlong_test_program(conformance everlong_session ${conformance})
  # On the CPU a test for every room, as the registry lists them, and one for the laws' own faults.
  file(STRINGS ${mechanisms_list} rooms REGEX "^EVERLONG_MECHANISM")
  set(elsewhere "*Cuda*:*Slow*")
  foreach(room IN LISTS rooms)
    string(REGEX REPLACE "^EVERLONG_MECHANISM\\((.*)\\).*" "\\1" room "${room}")
    add_test(NAME conformance_${room} COMMAND conformance --gtest_filter=*/${room}_*-*Cuda*:*Slow*)
    everlong_set_test(conformance_${room} conformance)
    string(APPEND elsewhere ":*/${room}_*")
  endforeach()
  add_test(NAME conformance COMMAND conformance --gtest_filter=-${elsewhere})
  add_test(NAME conformance_gpu COMMAND conformance --gtest_filter=*Cuda*-*Slow*)
  add_test(NAME conformance_slow COMMAND conformance --gtest_filter=*Slow*)
  everlong_set_test(conformance conformance)
  everlong_set_test(conformance_gpu gpu)
  everlong_set_test(conformance_slow slow)
  set_tests_properties(conformance_slow PROPERTIES TIMEOUT 1800)
  if(NOT EXISTS /proc/driver/nvidia/version)
    set_tests_properties(conformance_gpu conformance_slow PROPERTIES DISABLED ON)
  endif()
endif()

# What the authors' own code computed.
file(GLOB_RECURSE golden CONFIGURE_DEPENDS tests/golden/*.safetensors)
if(golden AND TARGET golden_check)
  add_test(NAME golden COMMAND golden_check ${PROJECT_SOURCE_DIR}/tests/golden)
  everlong_set_test(golden golden)
endif()

# What transformers makes of our folders: in the Python environment of `make interop`, where that was made.
if(TARGET everlong)
  set(interop_python ${PROJECT_SOURCE_DIR}/build/interop/bin/python)
  add_test(NAME transformers COMMAND ${interop_python} ${PROJECT_SOURCE_DIR}/tests/integration/transformers_test.py
                                     $<TARGET_FILE:everlong> ${PROJECT_SOURCE_DIR}/tests/golden)
  add_test(NAME tokenizers COMMAND ${interop_python} ${PROJECT_SOURCE_DIR}/tests/integration/tokenizers_test.py
                                   $<TARGET_FILE:everlong> ${PROJECT_SOURCE_DIR}/tests/golden)
  add_test(NAME tensorboard COMMAND ${interop_python} ${PROJECT_SOURCE_DIR}/tests/integration/tensorboard_test.py
                                    $<TARGET_FILE:everlong>)
  everlong_set_test(transformers interop)
  everlong_set_test(tokenizers interop)
  everlong_set_test(tensorboard interop)
  if(NOT EXISTS ${PROJECT_SOURCE_DIR}/build/interop/everlong.stamp)
    set_tests_properties(transformers tokenizers tensorboard PROPERTIES DISABLED ON)
    message(STATUS "Tests 'transformers', 'tokenizers' and 'tensorboard' are disabled: their Python packages are not there; `make interop` gets them")
  endif()
endif()

add_test(NAME check_layers COMMAND ${PROJECT_SOURCE_DIR}/tools/check_layers)
add_test(NAME check_layers_self_test COMMAND ${PROJECT_SOURCE_DIR}/tools/check_layers --self-test)
add_test(NAME check_format COMMAND ${PROJECT_SOURCE_DIR}/tools/check_format)
add_test(NAME nvcc_strict COMMAND ${PROJECT_SOURCE_DIR}/tools/nvcc_strict_test)
add_test(NAME study COMMAND ${PROJECT_SOURCE_DIR}/tools/study_test)
foreach(name check_layers check_layers_self_test check_format nvcc_strict study)
  everlong_set_test(${name} unit)
endforeach()
find_program(CLANG_FORMAT_PROGRAM NAMES clang-format-14)
if(NOT CLANG_FORMAT_PROGRAM)
  set_tests_properties(check_format PROPERTIES DISABLED ON)
endif()
