# libeverlong.so with the public headers of include/everlong, its CMake package and the program: `cmake --install`.
# The whole engine is in the one library; what it exports is the public interface and nothing else (library.map).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(version_header ${PROJECT_SOURCE_DIR}/include/everlong/version.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${version_header})
file(STRINGS ${version_header} header_version REGEX "^#define EVERLONG_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
list(TRANSFORM header_version REPLACE "^.* " "")
list(JOIN header_version "." header_version)
if(NOT header_version STREQUAL PROJECT_VERSION)
  message(FATAL_ERROR "include/everlong/version.h says ${header_version}, CMakeLists.txt ${PROJECT_VERSION}: make them one")
endif()

set(library_map ${PROJECT_SOURCE_DIR}/cmake/library.map)
add_library(everlong_shared SHARED ${library_sources})
add_library(Everlong::everlong ALIAS everlong_shared)
everlong_torch_target(everlong_shared)
target_link_libraries(everlong_shared PRIVATE everlong_all)
target_include_directories(everlong_shared PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(everlong_shared PUBLIC cxx_std_20)
target_link_options(everlong_shared PRIVATE "LINKER:--version-script=${library_map},--gc-sections")
set_property(TARGET everlong_shared APPEND PROPERTY LINK_DEPENDS ${library_map})
set_target_properties(everlong_shared PROPERTIES
  OUTPUT_NAME everlong EXPORT_NAME everlong DEFINE_SYMBOL ""
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)

# Installed files look for torch where it was when they were built; the package adds the place where it is.
string(REPLACE ":" ";" torch_rpath_list "${torch_rpath}")
set_target_properties(everlong_shared everlong PROPERTIES
  BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "${torch_rpath_list}")

install(TARGETS everlong_shared EXPORT EverlongTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS everlong RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/everlong DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/everlong)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/Everlong)
install(EXPORT EverlongTargets NAMESPACE Everlong:: DESTINATION ${package_folder})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/EverlongConfig.cmake.in ${CMAKE_BINARY_DIR}/generated/EverlongConfig.cmake
  INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/generated/EverlongConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/generated/EverlongConfig.cmake ${CMAKE_BINARY_DIR}/generated/EverlongConfigVersion.cmake
  DESTINATION ${package_folder})
