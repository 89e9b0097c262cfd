# SPDX-License-Identifier: Apache-2.0
# CUDA or not, and for which architectures. No GPU is ever looked for.
#
#   FORCE_CUDA=1 | 0                      from the environment, stronger than HW_CUDA
#   TORCH_CUDA_ARCH_LIST "8.0;9.0a+PTX"   or CMAKE_CUDA_ARCHITECTURES "80-real;90a"
#
# Result: HW_CUDA_FOUND, HW_CUDA_VERSION, HW_CUDA_REASON (why there is none), and the
# HW_CUDA_ARCHS_<SIMT|SM80|SM90> of HeadworksArchitectures.cmake.
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)

include(HeadworksArchitectures)

set(HW_NVCC_MINIMUM 12.4)

# The nvcc that CUDACXX names, or the first in CUDA_HOME, PATH, /usr/local/cuda and PyPI's wheels.
function(hw_find_nvcc out)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(nvcc NAMES $ENV{CUDACXX} NO_CACHE)
    if(NOT nvcc)
      set(nvcc "")
    endif()
    set(${out} "${nvcc}" PARENT_SCOPE)
    return()
  endif()
  set(folders "")
  foreach(variable CUDA_HOME CUDA_PATH)
    if(DEFINED ENV{${variable}})
      list(APPEND folders $ENV{${variable}}/bin)
    endif()
  endforeach()
  hw_site_packages(site_packages)
  set(later /usr/local/cuda/bin)
  foreach(folder IN LISTS site_packages)
    list(APPEND later ${folder}/nvidia/cu13/bin ${folder}/nvidia/cuda_nvcc/bin)
  endforeach()
  find_program(nvcc NAMES nvcc PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
  if(NOT nvcc)
    find_program(nvcc NAMES nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(NOT nvcc)
    find_program(nvcc NAMES nvcc PATHS ${later} NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(NOT nvcc)
    set(nvcc "")
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

# Where wheels live for the Python of this build (also inside pip's isolated environment).
function(hw_site_packages out)
  set(${out} "" PARENT_SCOPE)
  set(python ${HW_PYTHON_EXECUTABLE})
  if(NOT python)
    find_program(python NAMES python3 python NO_CACHE)
  endif()
  if(python)
    execute_process(
      COMMAND ${python} -c
        "import sysconfig as s; print(s.get_path('purelib'), s.get_path('platlib'), sep=';')"
      OUTPUT_VARIABLE paths OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(REMOVE_DUPLICATES paths)
    set(${out} "${paths}" PARENT_SCOPE)
  endif()
endfunction()

set(HW_CUDA_FOUND FALSE)
set(HW_CUDA_REASON "")
set(hw_wanted ${HW_CUDA})
if("$ENV{FORCE_CUDA}" STREQUAL "1")
  set(hw_wanted ON)
elseif("$ENV{FORCE_CUDA}" STREQUAL "0")
  set(hw_wanted OFF)
  set(HW_CUDA_REASON "it was built with FORCE_CUDA=0")
elseif(NOT "$ENV{FORCE_CUDA}" STREQUAL "")
  hw_stop("FORCE_CUDA is '$ENV{FORCE_CUDA}'; expected 1, 0 or nothing.")
endif()

if(NOT hw_wanted STREQUAL "AUTO" AND NOT hw_wanted)
  if(NOT HW_CUDA_REASON)
    set(HW_CUDA_REASON "it was built with the preset '${HW_PRESET}', which leaves CUDA out")
  endif()
else()
  hw_find_nvcc(hw_nvcc)
  if(hw_nvcc)
    execute_process(COMMAND ${hw_nvcc} --version OUTPUT_VARIABLE hw_text ERROR_VARIABLE hw_text)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" hw_text "${hw_text}")
    set(HW_CUDA_VERSION "${CMAKE_MATCH_1}")
    if(NOT HW_CUDA_VERSION)
      set(HW_CUDA_REASON "the nvcc found at build time does not run")
    elseif(HW_CUDA_VERSION VERSION_LESS HW_NVCC_MINIMUM)
      set(HW_CUDA_REASON
        "nvcc ${HW_CUDA_VERSION} at build time is older than the needed ${HW_NVCC_MINIMUM}")
    else()
      set(HW_CUDA_FOUND TRUE)
    endif()
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(HW_CUDA_REASON "the nvcc that CUDACXX named at build time was not there")
  else()
    set(HW_CUDA_REASON "nvcc was not found at build time")
  endif()
  if(NOT HW_CUDA_FOUND AND NOT hw_wanted STREQUAL "AUTO")
    hw_stop("CUDA was asked for (FORCE_CUDA=1 or the preset cuda), but ${HW_CUDA_REASON}. "
      "Looked in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and site-packages/nvidia/cu13. Install "
      "the CUDA toolkit ${HW_NVCC_MINIMUM} or later, or set FORCE_CUDA=0.")
  endif()
endif()

if(HW_CUDA_FOUND)
  hw_choose_archs()
  set(CMAKE_CUDA_COMPILER ${hw_nvcc})
  set(CMAKE_CUDA_ARCHITECTURES ${HW_CUDA_ARCHS_SIMT})
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "headworks: CPU and CUDA ${HW_CUDA_VERSION}, "
    "architectures ${HW_CUDA_ARCHS_SIMT} (sm80 kernels: ${HW_CUDA_ARCHS_SM80})")
else()
  message(STATUS "headworks: CPU only, because ${HW_CUDA_REASON}")
endif()
