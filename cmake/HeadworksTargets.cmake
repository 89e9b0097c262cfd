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

file(GLOB_RECURSE HW_SOURCES_CORE CONFIGURE_DEPENDS
  ${CMAKE_CURRENT_SOURCE_DIR}/csrc/core/*.cpp ${CMAKE_CURRENT_SOURCE_DIR}/csrc/softmax/*.cpp)

# libheadworks. The order of sources matters: of a function that several objects define (the
# standard library's templates) the linker keeps the first, which must be the one that needs least.
add_library(hw_native OBJECT ${HW_SOURCES_CORE} ${HW_SOURCES_HOST} ${hw_generated}/instances.cpp)
target_link_libraries(hw_native PRIVATE hw_flags)
foreach(isa IN LISTS HW_ISAS)
  target_sources(hw_native PRIVATE ${HW_SOURCES_CPU_${isa}})
endforeach()
set(HW_NATIVE_OBJECTS hw_native)
if(HW_CUDA_FOUND)
  target_include_directories(hw_native SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  # One target per backend, because each has its own architectures. Those of simt hold all others,
  # so of what several of them define, the linker's first choice serves every GPU.
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
  if(NOT HW_SANITIZE)  # Kernels are many and run for moments: what counts is the time to compile.
    set_source_files_properties(${HW_SOURCES_EMULATED} PROPERTIES COMPILE_OPTIONS -O1)
  endif()
  if(HW_RACES)
    target_compile_definitions(hw_emulated PRIVATE HW_EMU_RACES)
    set_source_files_properties(${HW_SOURCES_EMULATED} PROPERTIES
      COMPILE_OPTIONS "${HW_RACE_FLAGS}")
  endif()
  if(HW_COVERAGE)  # of all but the emulator itself; -O0 keeps every branch of the source
    target_compile_definitions(hw_emulated PRIVATE HW_COVERAGE)
    target_compile_options(hw_emulated PRIVATE --coverage -O0)
    set_source_files_properties(${HW_SOURCES_EMULATED} PROPERTIES COMPILE_OPTIONS "")
    set_source_files_properties(${HW_SOURCES_EMULATOR} PROPERTIES
      COMPILE_OPTIONS "-O3;-fno-profile-arcs;-fno-test-coverage")
  endif()
  target_link_libraries(hw_emulated PRIVATE hw_flags)
  hw_shared_library(headworks_emulator hw_emulated)
  target_link_libraries(headworks_emulator PRIVATE ${CMAKE_DL_LIBS} $<$<BOOL:${HW_COVERAGE}>:gcov>)
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
  # Each folder of tests is one program over the same objects as the library under test. A source
  # <name>_<isa>.cpp is for that instruction set of x86. It is left out on other processors, and in
  # a static library, because that is linked behind all objects.
  function(hw_test name definitions)
    file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/${name}/*.cpp)
    set(wide ${sources})
    list(FILTER wide INCLUDE REGEX "_avx[0-9a-z]+\\.cpp$")
    list(FILTER sources EXCLUDE REGEX "_avx[0-9a-z]+\\.cpp$")
    if(sources)
      set(objects ${ARGN})
      list(TRANSFORM objects REPLACE "(.+)" "$<TARGET_OBJECTS:\\1>")
      add_executable(${name}_tests ${sources} ${objects})
      target_compile_definitions(${name}_tests PRIVATE ${definitions})
      target_include_directories(${name}_tests PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/tests)
      foreach(isa IN LISTS HW_MACHINE_ISAS)
        set(of_isa ${wide})
        list(FILTER of_isa INCLUDE REGEX "_${isa}\\.cpp$")
        if(of_isa)
          set(library ${name}_tests_${isa})
          add_library(${library} STATIC ${of_isa})
          target_compile_options(${library} PRIVATE ${HW_CPU_FLAGS} ${HW_ISA_FLAGS_${isa}})
          target_include_directories(${library} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/tests)
          target_link_libraries(${library} PRIVATE hw_flags)
          target_link_libraries(${name}_tests PRIVATE ${library})
        endif()
      endforeach()
      target_link_libraries(${name}_tests PRIVATE hw_flags ${HW_CUDA_RUNTIME})
      add_test(NAME ${name} COMMAND ${name}_tests)
    endif()
  endfunction()
  hw_test(core "" ${HW_NATIVE_OBJECTS})
  if(HW_EMULATOR)
    hw_test(emu HW_EMULATE hw_emulated)
    target_link_libraries(emu_tests PRIVATE ${CMAKE_DL_LIBS})
    if(HW_RACES)
      target_compile_definitions(emu_tests PRIVATE HW_EMU_RACES)
      target_compile_options(emu_tests PRIVATE ${HW_RACE_FLAGS})
    endif()
  endif()
endif()
