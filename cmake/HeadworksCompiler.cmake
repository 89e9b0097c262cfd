# SPDX-License-Identifier: Apache-2.0
# Before project(): say in one line what is missing, and use ccache when it is there.
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)

if(NOT CMAKE_CXX_COMPILER)
  set(hw_candidates c++ g++ clang++)
  if(DEFINED ENV{CXX})
    # CXX may carry flags; only its first word is a program.
    string(REGEX MATCH "^[^ ]+" hw_candidates "$ENV{CXX}")
  endif()
  find_program(hw_cxx NAMES ${hw_candidates} NO_CACHE)
  if(NOT hw_cxx)
    string(REPLACE ";" ", " hw_candidates "${hw_candidates}")
    hw_stop("no C++20 compiler (looked for: ${hw_candidates}). Install one, e.g. "
      "'apt install g++' or 'dnf install gcc-c++', or name it in CXX.")
  endif()
endif()

find_program(HW_CCACHE ccache DOC "Compiler cache, used when found; empty to switch it off")
if(HW_CCACHE)
  foreach(language CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER ${HW_CCACHE})
    endif()
  endforeach()
endif()

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
