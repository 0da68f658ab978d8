# Highway: SIMD with run-time dispatch for the CPU kernels. Only its target detection is linked.
find_library(HIGHWAY_LIBRARY hwy)
find_path(HIGHWAY_INCLUDE_DIR hwy/highway.h)
if(NOT HIGHWAY_LIBRARY OR NOT HIGHWAY_INCLUDE_DIR)
  message(FATAL_ERROR "Highway was not found. Run `make setup`, or install libhwy-dev.")
endif()
# A copy beside the programs: they can be carried to a machine that has no such package.
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/bin/runtime)
file(REAL_PATH ${HIGHWAY_LIBRARY} highway_real)
file(COPY_FILE ${highway_real} ${CMAKE_BINARY_DIR}/bin/runtime/libhwy.so.1 ONLY_IF_DIFFERENT)
add_library(everlong_highway INTERFACE)
target_include_directories(everlong_highway SYSTEM INTERFACE ${HIGHWAY_INCLUDE_DIR})
target_link_libraries(everlong_highway INTERFACE ${HIGHWAY_LIBRARY})
