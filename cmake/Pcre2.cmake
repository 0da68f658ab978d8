# PCRE2: regular expressions with Unicode classes, for the patterns of tokenizers.
find_library(PCRE2_LIBRARY pcre2-8)
find_path(PCRE2_INCLUDE_DIR pcre2.h)
if(NOT PCRE2_LIBRARY OR NOT PCRE2_INCLUDE_DIR)
  message(FATAL_ERROR "PCRE2 was not found. Run `make setup`, or install libpcre2-dev.")
endif()
# A copy beside the programs: they can be carried to a machine that has no such package.
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/bin/runtime)
file(REAL_PATH ${PCRE2_LIBRARY} pcre2_real)
file(COPY_FILE ${pcre2_real} ${CMAKE_BINARY_DIR}/bin/runtime/libpcre2-8.so.0 ONLY_IF_DIFFERENT)
add_library(everlong_pcre2 INTERFACE)
target_include_directories(everlong_pcre2 SYSTEM INTERFACE ${PCRE2_INCLUDE_DIR})
target_link_libraries(everlong_pcre2 INTERFACE ${PCRE2_LIBRARY})
