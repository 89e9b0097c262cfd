# SPDX-License-Identifier: Apache-2.0
# The Python module _C: the only file that knows Python, so a new Python compiles this alone.
# Its paths are asked from the interpreter at every configure and never cached: pip builds in an
# environment whose folder changes from run to run.
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)

set(hw_python ${HW_PYTHON_EXECUTABLE})
if(NOT hw_python)
  find_program(hw_python NAMES python3 python NO_CACHE)
endif()
if(NOT hw_python)
  hw_stop("no python3 on PATH. Set HW_PYTHON_EXECUTABLE, or HW_PYTHON=OFF to leave _C out.")
endif()
string(CONCAT hw_question
  "import sysconfig as s, pybind11 as p; "
  "print(s.get_path('include'), s.get_path('platinclude'), p.get_include(), "
  "s.get_config_var('EXT_SUFFIX'), sep='|')")
execute_process(COMMAND ${hw_python} -c "${hw_question}"
  OUTPUT_VARIABLE hw_paths ERROR_VARIABLE hw_error RESULT_VARIABLE hw_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT hw_result EQUAL 0)
  string(REGEX REPLACE "\n+$" "" hw_error "${hw_error}")
  string(REGEX REPLACE ".*\n" "" hw_error "${hw_error}")
  hw_stop("${hw_python} cannot import pybind11 (${hw_error}). Run 'pip install pybind11' for "
    "it, or set HW_PYTHON=OFF to leave _C out.")
endif()
string(REPLACE "|" ";" hw_paths "${hw_paths}")
list(POP_BACK hw_paths hw_suffix)
list(REMOVE_DUPLICATES hw_paths)

file(GLOB hw_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/binding/*.cpp)
add_library(_C MODULE ${hw_sources})
target_include_directories(_C SYSTEM PRIVATE ${hw_paths})
target_link_libraries(_C PRIVATE hw_flags headworks ${CMAKE_DL_LIBS})
set_target_properties(_C PROPERTIES
  PREFIX "" SUFFIX "${hw_suffix}" BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN")
hw_export_only(_C PyInit__C)
