# SPDX-License-Identifier: Apache-2.0
# The options that presets set, and the compiler flags common to all targets.
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)

set(HW_PRESET "" CACHE STRING "Name of the preset, for `headworks info`")
set(HW_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO (nvcc and a GPU, or architectures, are there)")
option(HW_EMULATOR "Also build the CUDA kernels for the emulator" OFF)
option(HW_MINIMAL "One dtype, one dim and two CPU instruction sets per operator (preset dev)" OFF)
set(HW_MINIMAL_DTYPES f32 CACHE STRING "Which of an operator's dtypes HW_MINIMAL builds")
option(HW_MINIMAL_WIDEST "The widest dim of an operator besides, in HW_MINIMAL" OFF)
set(HW_MINIMAL_WITHOUT avx512 avx512bf16 CACHE STRING "CPU instruction sets that HW_MINIMAL leaves out")
option(HW_SANITIZE "AddressSanitizer and UndefinedBehaviorSanitizer" OFF)
option(HW_RACES "The emulator compares all accesses to memory (preset races)" OFF)
option(HW_COVERAGE "Count what runs of the kernels in the emulator and of their hosts (preset coverage)" OFF)
option(HW_TESTS "C++ tests (core_tests, emu_tests)" OFF)
option(HW_PYTHON "The Python module _C" ON)
set(HW_PYTHON_EXECUTABLE "" CACHE STRING "Python to build _C for; default: python3 on PATH")

set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)

find_package(OpenMP COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  hw_stop("${CMAKE_CXX_COMPILER_ID} has no OpenMP here. Install libgomp for g++ or libomp for "
    "clang++.")
endif()

# Every target of the project links this. The language standard is a plain flag, because older
# CMakes do not know that nvcc has C++20.
add_library(hw_flags INTERFACE)
target_include_directories(hw_flags INTERFACE
  ${CMAKE_CURRENT_SOURCE_DIR}/csrc ${CMAKE_BINARY_DIR}/generated)
target_compile_options(hw_flags INTERFACE
  -std=c++20
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffunction-sections>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all;-Xcompiler=-Wall,-Wextra;--expt-relaxed-constexpr>)
target_link_libraries(hw_flags INTERFACE OpenMP::OpenMP_CXX)
if(HW_SANITIZE)
  target_compile_options(hw_flags INTERFACE
    -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  target_link_options(hw_flags INTERFACE -fsanitize=address,undefined)
endif()

# For kernels in the emulator's race check: the compiler puts a call before every access, which goes
# to csrc/emu/race_hooks.cpp. For compiling only: ThreadSanitizer's library is not linked.
set(HW_RACE_FLAGS -O1 -g1 -fsanitize=thread)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND HW_RACE_FLAGS --param=tsan-instrument-func-entry-exit=0)
endif()

# CPU instruction sets, weakest first, and the flags that select them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(HW_ISAS baseline avx2 avx512 avx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(HW_ISAS neon)
else()
  set(HW_ISAS baseline)
endif()
set(HW_MACHINE_ISAS ${HW_ISAS})
if(HW_MINIMAL)
  list(REMOVE_ITEM HW_ISAS ${HW_MINIMAL_WITHOUT})
endif()
# For old processors only: compiled in a third of the time.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT HW_SANITIZE)
  set(HW_ISA_FLAGS_baseline -O1)
endif()
if(HW_RACES OR HW_COVERAGE)  # which are about other code
  list(REMOVE_ITEM HW_ISAS avx2)
endif()
set(HW_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(HW_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(HW_ISA_FLAGS_avx512bf16 ${HW_ISA_FLAGS_avx512} -mavx512bf16)
# An instruction set that is worth it for some instances only, <operator>_<dtype>, or not for some
# dtypes; the others fall back to a weaker one.
set(HW_ISA_INSTANCES_avx512bf16 attention_bf16 routing_attention_bf16 window_attention_bf16)
set(HW_ISA_WITHOUT_avx512 f64)
set(HW_CPU_FLAGS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # A unit holds several dtypes; gcc stops inlining in large ones. What is not inlined in a unit for a
  # wide instruction set may be taken from one for the baseline.
  list(APPEND HW_CPU_FLAGS --param=inline-unit-growth=1000 --param=large-unit-insns=1000000)
endif()
if(HW_SANITIZE)
  list(REMOVE_ITEM HW_CPU_FLAGS -O3)
endif()
