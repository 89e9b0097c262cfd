# SPDX-License-Identifier: Apache-2.0
# The libraries, the Python module and the tests.
include_guard()

configure_file(${hw_templates}/build_config.h.in ${hw_generated}/build_config.h @ONLY)
set(HW_ROWS "${HW_ROWS_NATIVE}")
configure_file(${hw_templates}/instances.cpp.in ${hw_generated}/instances.cpp @ONLY)
set(HW_ROWS "${HW_ROWS_EMULATED}")
configure_file(${hw_templates}/instances.cpp.in ${hw_generated}/instances_emulated.cpp @ONLY)

# A library exports one symbol and nothing else, not even the standard library's templates: an
# instantiation compiled for a wider instruction set must never serve another library.
function(hw_export_only target HW_SYMBOL)
  set(map ${hw_generated}/${target}.map)
  configure_file(${hw_templates}/exports.map.in ${map} @ONLY)
  target_link_options(${target} PRIVATE -Wl,--version-script=${map} -Wl,--gc-sections)
  set_target_properties(${target} PROPERTIES LINK_DEPENDS ${map})
endfunction()

function(hw_shared_library name)
  set(objects ${ARGN})
  list(TRANSFORM objects REPLACE "(.+)" "$<TARGET_OBJECTS:\\1>")
  add_library(${name} SHARED ${objects})
  target_link_libraries(${name} PRIVATE hw_flags)
  hw_export_only(${name} hw_api)
  if(NOT HW_SANITIZE)  # whose run-time library is in the program, not here
    target_link_options(${name} PRIVATE -Wl,-z,defs)
  endif()
endfunction()

file(GLOB HW_SOURCES_CORE CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/core/*.cpp)

# libheadworks. The order of sources matters: of a function that several objects define (the
# standard library's templates) the linker keeps the first, which must be the one that needs least.
add_library(hw_native OBJECT ${HW_SOURCES_CORE} ${HW_SOURCES_HOST} ${hw_generated}/instances.cpp)
target_link_libraries(hw_native PRIVATE hw_flags)
foreach(isa IN LISTS HW_ISAS)
  target_sources(hw_native PRIVATE ${HW_SOURCES_CPU_${isa}})
endforeach()
set(HW_NATIVE_OBJECTS hw_native)
set(HW_CUDA_RUNTIME "")
if(HW_CUDA_FOUND)
  set(HW_CUDA_RUNTIME CUDA::cudart_static)
  target_include_directories(hw_native SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  # One target per backend, because each has its own architectures.
  foreach(backend SIMT SM80 SM90)
    if(HW_SOURCES_CUDA_${backend})
      add_library(hw_cuda_${backend} OBJECT ${HW_SOURCES_CUDA_${backend}})
      set_target_properties(hw_cuda_${backend} PROPERTIES
        CUDA_ARCHITECTURES "${HW_CUDA_ARCHS_${backend}}")
      target_link_libraries(hw_cuda_${backend} PRIVATE hw_flags)
      list(APPEND HW_NATIVE_OBJECTS hw_cuda_${backend})
    endif()
  endforeach()
endif()
hw_shared_library(headworks ${HW_NATIVE_OBJECTS})
target_link_libraries(headworks PRIVATE ${HW_CUDA_RUNTIME})
set(HW_PYTHON_TARGETS headworks)

if(HW_EMULATOR)
  file(GLOB HW_SOURCES_EMULATOR CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/emu/*.cpp)
  add_library(hw_emulated OBJECT ${HW_SOURCES_CORE} ${HW_SOURCES_HOST} ${HW_SOURCES_EMULATOR}
    ${hw_generated}/instances_emulated.cpp ${HW_SOURCES_EMULATED})
  target_compile_definitions(hw_emulated PRIVATE HW_EMULATE)
  target_link_libraries(hw_emulated PRIVATE hw_flags)
  hw_shared_library(headworks_emulator hw_emulated)
  list(APPEND HW_PYTHON_TARGETS headworks_emulator)
endif()

if(HW_PYTHON)
  include(HeadworksPython)
  list(APPEND HW_PYTHON_TARGETS _C)
endif()
add_custom_target(python_package DEPENDS ${HW_PYTHON_TARGETS})
install(TARGETS ${HW_PYTHON_TARGETS} LIBRARY DESTINATION . COMPONENT python)

if(HW_TESTS)
  enable_testing()
  # Each folder of tests is one program over the same objects as the library under test.
  function(hw_test name definitions)
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/${name}/*.cpp)
    if(sources)
      set(objects ${ARGN})
      list(TRANSFORM objects REPLACE "(.+)" "$<TARGET_OBJECTS:\\1>")
      add_executable(${name}_tests ${sources} ${objects})
      target_compile_definitions(${name}_tests PRIVATE ${definitions})
      target_include_directories(${name}_tests PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/tests)
      target_link_libraries(${name}_tests PRIVATE hw_flags ${HW_CUDA_RUNTIME})
      add_test(NAME ${name} COMMAND ${name}_tests)
    endif()
  endfunction()
  hw_test(core "" ${HW_NATIVE_OBJECTS})
  if(HW_EMULATOR)
    hw_test(emu HW_EMULATE hw_emulated)
  endif()
endif()
