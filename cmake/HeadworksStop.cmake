# SPDX-License-Identifier: Apache-2.0
# hw_stop(text...): what is wrong and what to do about it, in one line; then the end.
include_guard()

function(hw_stop)
  set(text "")
  math(EXPR last "${ARGC} - 1")
  foreach(i RANGE ${last})
    string(APPEND text "${ARGV${i}}")
  endforeach()
  message(NOTICE "headworks: ${text}")
  message(FATAL_ERROR "Stopped, for the reason above.")
endfunction()
