# SPDX-License-Identifier: Apache-2.0
# Whether CUDA code is built: functions of the environment and of the machine, which tests run by
# `cmake -P`.
#
#   FORCE_CUDA=1 | 0                      from the environment, stronger than HW_CUDA
#   TORCH_CUDA_ARCH_LIST "8.0;9.0a+PTX"   or CMAKE_CUDA_ARCHITECTURES "80-real;90a": CUDA where
#                                         there is nvcc, for these
#   none of them                          nvcc and a GPU: CUDA, for this GPU; otherwise CPU only
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksArchitectures.cmake)

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

# Version and architectures (ascending) of an nvcc; empty if it does not run.
function(hw_ask_nvcc nvcc version known)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_VARIABLE text)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" text "${text}")
  set(${version} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCHALL "compute_[0-9]+" archs "${text}")
  list(TRANSFORM archs REPLACE "compute_" "")
  list(SORT archs COMPARE NATURAL)
  set(${known} "${archs}" PARENT_SCOPE)
endfunction()

# ON, OFF or AUTO, of HW_CUDA and the environment; `reason`: why OFF.
function(hw_wanted_cuda wanted reason)
  set(${wanted} ${HW_CUDA} PARENT_SCOPE)
  set(${reason} "it was built with the preset '${HW_PRESET}', which leaves CUDA out" PARENT_SCOPE)
  if("$ENV{FORCE_CUDA}" STREQUAL "1")
    set(${wanted} ON PARENT_SCOPE)
  elseif("$ENV{FORCE_CUDA}" STREQUAL "0")
    set(${wanted} OFF PARENT_SCOPE)
    set(${reason} "it was built with FORCE_CUDA=0" PARENT_SCOPE)
  elseif(NOT "$ENV{FORCE_CUDA}" STREQUAL "")
    hw_stop("FORCE_CUDA is '$ENV{FORCE_CUDA}'; expected 1, 0 or nothing.")
  endif()
endfunction()

# Why this nvcc cannot compile; empty if it can.
function(hw_why_not_nvcc nvcc version gpus out)
  if(nvcc AND NOT version)
    set(reason "the nvcc found at build time does not run")
  elseif(nvcc AND version VERSION_LESS HW_NVCC_MINIMUM)
    set(reason "nvcc ${version} at build time is older than the needed ${HW_NVCC_MINIMUM}")
  elseif(nvcc)
    set(reason "")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(reason "the nvcc that CUDACXX named at build time was not there")
  elseif(gpus)
    string(CONCAT reason "nvcc was not found at build time, though there was a GPU: install the "
      "CUDA toolkit ${HW_NVCC_MINIMUM} or later and install headworks again")
  else()
    set(reason "nvcc was not found at build time")
  endif()
  set(${out} "${reason}" PARENT_SCOPE)
endfunction()

# Why there is nothing to compile for that the user has not asked for; empty if there is.
function(hw_why_not_gpus gpus out)
  hw_archs_from(75 "${gpus}" served)
  hw_archs_are_given(given)
  set(reason "")
  if(given OR served OR gpus STREQUAL "unknown")
  elseif(gpus)
    set(reason "the GPU at build time, sm_${gpus}, is older than sm_75, the oldest supported")
  else()
    string(CONCAT reason "no GPU was visible at build time; to compile CUDA all the same, install "
      "with FORCE_CUDA=1, for one kind of GPU with TORCH_CUDA_ARCH_LIST=9.0a or its like")
  endif()
  set(${out} "${reason}" PARENT_SCOPE)
endfunction()

# What a driver is too old for, as a warning; `version`: of the toolkit.
function(hw_warn_of_driver driver version)
  set(needed 525)
  if(version VERSION_GREATER_EQUAL 13)
    set(needed 580)
  endif()
  if(driver AND driver LESS needed)
    message(NOTICE "headworks: the driver is ${driver}; what CUDA ${version} compiles needs "
      "${needed} or later, so no CUDA backend will run before it is updated.")
  endif()
endfunction()

# Sets HW_CUDA_FOUND and HW_CUDA_REASON (why not) and, where found, HW_NVCC, HW_CUDA_VERSION and
# HW_CUDA_ARCHS_<SIMT|SM80|SM90>.
macro(hw_decide_cuda)
  set(HW_CUDA_FOUND FALSE)
  hw_wanted_cuda(hw_wanted HW_CUDA_REASON)
  if(hw_wanted STREQUAL "AUTO" OR hw_wanted)
    hw_visible_gpus(hw_gpus hw_driver)
    hw_find_nvcc(HW_NVCC)
    set(HW_CUDA_VERSION "")
    if(HW_NVCC)
      hw_ask_nvcc(${HW_NVCC} HW_CUDA_VERSION hw_known)
    endif()
    hw_why_not_nvcc("${HW_NVCC}" "${HW_CUDA_VERSION}" "${hw_gpus}" HW_CUDA_REASON)
    if(HW_CUDA_REASON AND NOT hw_wanted STREQUAL "AUTO")
      hw_stop("CUDA was asked for (FORCE_CUDA=1 or the preset cuda), but ${HW_CUDA_REASON}. "
        "Looked in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and site-packages/nvidia/cu13. "
        "Install the CUDA toolkit ${HW_NVCC_MINIMUM} or later, or set FORCE_CUDA=0.")
    endif()
    if(NOT HW_CUDA_REASON AND hw_wanted STREQUAL "AUTO")
      hw_why_not_gpus("${hw_gpus}" HW_CUDA_REASON)
    endif()
    if(NOT HW_CUDA_REASON)
      set(HW_CUDA_FOUND TRUE)
      hw_choose_archs("${hw_gpus}" "${hw_known}")
      hw_warn_of_driver("${hw_driver}" ${HW_CUDA_VERSION})
    endif()
  endif()
endmacro()
