# ccache before the compilers and mold as the linker, where they are installed.
find_program(CCACHE_PROGRAM ccache)
find_program(MOLD_PROGRAM mold)

# ptxas says in a mere notice that it serialised a pipeline, a loss of a third: tools/nvcc_strict makes that an error.
set(CMAKE_CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/tools/nvcc_strict)
if(CCACHE_PROGRAM)
  # Without this sloppiness ccache keeps nothing that was compiled with a precompiled header.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime ${CCACHE_PROGRAM})
  list(APPEND CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()
if(MOLD_PROGRAM)
  add_link_options($<$<LINK_LANGUAGE:CXX>:-fuse-ld=mold>)
endif()

# Options of every C++ file of the project.
add_library(everlong_options INTERFACE)
target_include_directories(everlong_options INTERFACE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
target_compile_options(everlong_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor>)
find_package(Threads REQUIRED)
target_link_libraries(everlong_options INTERFACE Threads::Threads ${CMAKE_DL_LIBS})

# Warnings are errors where one known compiler sees only our own headers. g++ 12 finds -Wrestrict in correct uses of
# std::string (its bug 105651), so that one is off.
set(everlong_strict "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION MATCHES "^12\\.")
  set(everlong_strict $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
