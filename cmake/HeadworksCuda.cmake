# SPDX-License-Identifier: Apache-2.0
# Switches CUDA on where HeadworksCudaChoice.cmake decides so, and says in one line what was decided.
#
# Result: HW_CUDA_FOUND, HW_CUDA_VERSION, HW_CUDA_REASON (why there is none), and the
# HW_CUDA_ARCHS_<SIMT|SM80|SM90> of HeadworksArchitectures.cmake.
include_guard()
include(HeadworksCudaChoice)

hw_decide_cuda()
if(HW_CUDA_FOUND)
  set(CMAKE_CUDA_COMPILER ${HW_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES ${HW_CUDA_ARCHS_SIMT})
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "headworks: CPU and CUDA ${HW_CUDA_VERSION}, "
    "architectures ${HW_CUDA_ARCHS_SIMT} (sm80 kernels: ${HW_CUDA_ARCHS_SM80})")
else()
  message(STATUS "headworks: CPU only, because ${HW_CUDA_REASON}")
endif()
