# SPDX-License-Identifier: Apache-2.0
# Switches CUDA on where HeadworksCudaChoice.cmake decides so, and says in one line what was decided.
#
# Result: HW_CUDA_FOUND, HW_CUDA_VERSION, HW_CUDA_REASON (why there is none), HW_CUDA_RUNTIME (what to
# link), and the HW_CUDA_ARCHS_<SIMT|SM80|SM90> of HeadworksArchitectures.cmake.
include_guard()
include(HeadworksCudaChoice)

# The static runtime of the toolkit around nvcc. CMake's own search knows neither the layout of PyPI's
# wheels (lib instead of lib64, no libcudart.so) nor needs less than all of the toolkit.
macro(hw_enable_cuda)
  get_filename_component(hw_toolkit ${HW_NVCC} REALPATH)
  get_filename_component(hw_toolkit ${hw_toolkit}/../.. ABSOLUTE)
  if(EXISTS ${hw_toolkit}/lib/libcudart_static.a)
    set(ENV{LIBRARY_PATH} "${hw_toolkit}/lib:$ENV{LIBRARY_PATH}")
  endif()
  set(CMAKE_CUDA_COMPILER ${HW_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES ${HW_CUDA_ARCHS_SIMT})
  enable_language(CUDA)
  find_library(hw_cudart NAMES libcudart_static.a NO_CACHE
    HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${hw_toolkit}/lib64 ${hw_toolkit}/lib)
  if(NOT hw_cudart)
    hw_stop("${HW_NVCC} comes without libcudart_static.a. Install the runtime's development files "
      "(nvidia-cuda-runtime for PyPI's nvcc, cuda-cudart-dev elsewhere), or set FORCE_CUDA=0.")
  endif()
  find_package(Threads REQUIRED)
  set(HW_CUDA_RUNTIME ${hw_cudart} Threads::Threads ${CMAKE_DL_LIBS} rt)
endmacro()

set(HW_CUDA_RUNTIME "")
hw_decide_cuda()
if(HW_CUDA_FOUND)
  hw_enable_cuda()
  message(STATUS "headworks: CPU and CUDA ${HW_CUDA_VERSION}, "
    "architectures ${HW_CUDA_ARCHS_SIMT} (sm80 kernels: ${HW_CUDA_ARCHS_SM80})")
else()
  message(STATUS "headworks: CPU only, because ${HW_CUDA_REASON}")
endif()
