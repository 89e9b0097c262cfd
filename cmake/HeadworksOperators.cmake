# SPDX-License-Identifier: Apache-2.0
# How one line becomes translation units and the dispatch table.
#
#   hw_add_operator(name FUNCTIONS f...  CPU t...  SIMT t...  SM80 t... SM80_DIMS d...  SM90 ...
#                   CPU_APART t...  SIMT_PTXAS option...  SIMT_TOGETHER)
#
# Instances are translation units of a few lines, written under the build folder:
#   cpu          per instruction set, around csrc/ops/<name>/<name>_cpu.cpp, for all dtypes together
#                but those listed as APART; instruction sets with a list HW_ISA_INSTANCES_<isa> only
#                for the instances in it, with a list HW_ISA_WITHOUT_<isa> not for its dtypes
#   simt, sm80   per (dtype, dim), around csrc/ops/<name>/<name>_<backend>.cuh; a .cu for nvcc and,
#                for the emulator, the same text as .cpp. Where nvcc mostly reads headers, all are
#                TOGETHER in one .cu. PTXAS: options for the assembler
# Files that would not change are not rewritten, so a second configure compiles nothing.
include_guard()
include(${CMAKE_CURRENT_LIST_DIR}/HeadworksStop.cmake)

set(HW_SOURCES_HOST "")      # csrc/ops/<name>/<name>.cpp
foreach(hw_backend SIMT SM80 SM90)
  set(HW_SOURCES_CUDA_${hw_backend} "")  # generated .cu
endforeach()
set(HW_SOURCES_EMULATED "")  # generated .cpp
foreach(isa IN LISTS HW_ISAS)
  set(HW_SOURCES_CPU_${isa} "")
endforeach()
set(HW_DECLARATIONS "")
set(HW_OPERATOR_ROWS "")
set(HW_ROWS_NATIVE "")
set(HW_ROWS_EMULATED "")

set(hw_templates ${CMAKE_CURRENT_LIST_DIR}/templates)
set(hw_generated ${CMAKE_BINARY_DIR}/generated)
set(HW_TYPE_f64 double)
set(HW_TYPE_f32 float)
set(HW_TYPE_bf16 hw::bf16)
set(HW_TYPE_f16 hw::f16)

macro(hw_add_operator name)
  set(HW_OP ${name})
  cmake_parse_arguments(hw "SIMT_TOGETHER" ""
    "FUNCTIONS;CPU;CPU_APART;SIMT;SIMT_DIMS;SIMT_PTXAS;SM80;SM80_DIMS;SM90;SM90_DIMS"
    ${ARGN})
  if(NOT hw_FUNCTIONS OR hw_UNPARSED_ARGUMENTS)
    hw_stop("hw_add_operator(${HW_OP}): FUNCTIONS is missing, or these are unknown: "
      "${hw_UNPARSED_ARGUMENTS}")
  endif()
  set(hw_folder ${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/${HW_OP})
  hw_add_host()
  hw_add_cpu()
  foreach(hw_backend SIMT SM80 SM90)
    hw_add_gpu(${hw_backend})
  endforeach()
endmacro()

macro(hw_require file)
  if(NOT EXISTS ${file})
    hw_stop("hw_add_operator(${HW_OP}): ${file} is declared in CMakeLists.txt, but the "
      "file is not there.")
  endif()
endmacro()

# Those of HW_MINIMAL_DTYPES (else the first) in the minimal preset; all otherwise.
macro(hw_dtypes declared out)
  set(${out} ${declared})
  if(HW_MINIMAL AND ${out})
    set(hw_few)
    foreach(hw_dtype ${HW_MINIMAL_DTYPES})
      if(hw_dtype IN_LIST ${out})
        list(APPEND hw_few ${hw_dtype})
      endif()
    endforeach()
    if(NOT hw_few)
      list(GET ${out} 0 hw_few)
    endif()
    set(${out} ${hw_few})
  endif()
endmacro()

macro(hw_add_host)
  hw_require(${hw_folder}/${HW_OP}.cpp)
  list(APPEND HW_SOURCES_HOST ${hw_folder}/${HW_OP}.cpp)
  string(APPEND HW_DECLARATIONS "namespace ${HW_OP} { extern const Operator kOperator; }\n")
  string(APPEND HW_OPERATOR_ROWS "    &${HW_OP}::kOperator,\n")
endmacro()

# What dtypes of one unit share is compiled once: the headers, and all code that knows only the
# accumulation type.
macro(hw_add_cpu)
  hw_dtypes("${hw_CPU}" hw_list)
  if(hw_list)
    hw_require(${hw_folder}/${HW_OP}_cpu.cpp)
  endif()
  set(hw_together ${hw_list})
  list(REMOVE_ITEM hw_together ${hw_CPU_APART} "")
  foreach(HW_ISA IN LISTS HW_ISAS)
    hw_write_cpu_unit(${HW_OP}_cpu_${HW_ISA} "${hw_together}")
    foreach(hw_dtype IN LISTS hw_CPU_APART)
      if(hw_dtype IN_LIST hw_list)
        hw_write_cpu_unit(${HW_OP}_cpu_${hw_dtype}_${HW_ISA} ${hw_dtype})
      endif()
    endforeach()
  endforeach()
endmacro()

# One unit with the instances of these dtypes for HW_ISA; none where that is not worth it.
macro(hw_write_cpu_unit name dtypes)
  set(HW_TABLES "")
  foreach(HW_DTYPE IN ITEMS ${dtypes})
    if((NOT HW_ISA_INSTANCES_${HW_ISA} OR ${HW_OP}_${HW_DTYPE} IN_LIST HW_ISA_INSTANCES_${HW_ISA})
        AND NOT HW_DTYPE IN_LIST HW_ISA_WITHOUT_${HW_ISA})
      set(HW_INSTANCE ${HW_OP}_cpu_${HW_DTYPE}_${HW_ISA})
      string(APPEND HW_TABLES "extern const FunctionTable ${HW_INSTANCE};\n"
        "const FunctionTable ${HW_INSTANCE} = kTable<${HW_TYPE_${HW_DTYPE}}>;\n")
      string(APPEND HW_DECLARATIONS "extern const FunctionTable ${HW_INSTANCE};\n")
      string(APPEND HW_ROWS_NATIVE "    {&${HW_OP}::kOperator, Backend::cpu, DType::${HW_DTYPE}, "
        "0, Isa::${HW_ISA}, &${HW_INSTANCE}},\n")
    endif()
  endforeach()
  if(HW_TABLES)
    set(hw_out ${hw_generated}/${name}.cpp)
    configure_file(${hw_templates}/instance_cpu.cpp.in ${hw_out} @ONLY)
    set_source_files_properties(${hw_out} PROPERTIES
      COMPILE_OPTIONS "${HW_CPU_FLAGS};${HW_ISA_FLAGS_${HW_ISA}}")
    list(APPEND HW_SOURCES_CPU_${HW_ISA} ${hw_out})
  endif()
endmacro()

macro(hw_add_gpu backend)
  set(hw_upper ${backend})
  string(TOLOWER ${backend} HW_BACKEND)
  string(SUBSTRING ${hw_upper} 0 1 hw_initial)
  string(SUBSTRING ${HW_BACKEND} 1 -1 HW_STRUCT)
  string(PREPEND HW_STRUCT ${hw_initial})
  hw_dtypes("${hw_${backend}}" hw_list)
  set(hw_dims ${hw_${backend}_DIMS})
  if(NOT hw_dims)
    set(hw_dims 0)
  endif()
  if(HW_MINIMAL)
    # The narrowest; on demand and under sanitizers and other checks the widest too, which takes
    # every call that it does not.
    list(GET hw_dims 0 hw_narrowest)
    list(GET hw_dims -1 hw_widest)
    set(hw_dims ${hw_narrowest})
    if((HW_MINIMAL_WIDEST OR HW_SANITIZE OR HW_RACES OR HW_COVERAGE)
        AND NOT hw_widest EQUAL hw_narrowest)
      list(APPEND hw_dims ${hw_widest})
    endif()
  endif()
  set(HW_KERNEL_HEADER ops/${HW_OP}/${HW_OP}_${HW_BACKEND}.cuh)
  if(hw_list)
    hw_require(${CMAKE_CURRENT_SOURCE_DIR}/csrc/${HW_KERNEL_HEADER})
  endif()
  set(hw_tables_together "")
  foreach(HW_DTYPE IN LISTS hw_list)
    foreach(HW_DIM IN LISTS hw_dims)
      hw_add_gpu_instance()
    endforeach()
  endforeach()
  if(hw_tables_together)
    set(HW_TABLES "${hw_tables_together}")
    hw_write_gpu_unit(${HW_OP}_${HW_BACKEND}.cu HW_SOURCES_CUDA_${hw_upper})
  endif()
endmacro()

macro(hw_add_gpu_instance)
  set(HW_TYPE ${HW_TYPE_${HW_DTYPE}})
  set(hw_kernel "${HW_OP}::${HW_STRUCT}<${HW_TYPE}, ${HW_DIM}>")
  set(HW_INSTANCE ${HW_OP}_${HW_BACKEND}_${HW_DTYPE}_${HW_DIM})
  string(APPEND HW_DECLARATIONS "extern const FunctionTable ${HW_INSTANCE};\n")
  set(HW_FINDERS "")
  string(CONCAT HW_TABLES "extern const FunctionTable ${HW_INSTANCE};\n"
    "const FunctionTable ${HW_INSTANCE} = {{\n")
  foreach(function IN LISTS hw_FUNCTIONS)
    string(APPEND HW_FINDERS "HW_FUNCTION_OF(${function})\n")
    string(APPEND HW_TABLES "    ${function}_of<${hw_kernel}>(),\n")
  endforeach()
  string(APPEND HW_TABLES "}};\n")
  string(CONCAT hw_row "    {&${HW_OP}::kOperator, Backend::${HW_BACKEND}, DType::${HW_DTYPE}, "
    "${HW_DIM}, Isa::none, &${HW_INSTANCE}},\n")
  if(HW_CUDA_FOUND AND HW_CUDA_ARCHS_${hw_upper})
    if(hw_${hw_upper}_TOGETHER)
      string(APPEND hw_tables_together "${HW_TABLES}")
    else()
      hw_write_gpu_unit(${HW_INSTANCE}.cu HW_SOURCES_CUDA_${hw_upper})
    endif()
    string(APPEND HW_ROWS_NATIVE "${hw_row}")
  endif()
  if(HW_EMULATOR AND NOT HW_BACKEND STREQUAL "sm90")
    hw_write_gpu_unit(${HW_INSTANCE}.cpp HW_SOURCES_EMULATED)
    string(APPEND HW_ROWS_EMULATED "${hw_row}")
  endif()
endmacro()

# One unit with the instances of HW_TABLES; appends it to `sources`.
macro(hw_write_gpu_unit name sources)
  set(hw_out ${hw_generated}/${name})
  configure_file(${hw_templates}/instance_gpu.in ${hw_out} @ONLY)
  list(APPEND ${sources} ${hw_out})
  if("${name}" MATCHES "\\.cu$" AND hw_${hw_upper}_PTXAS)
    set_source_files_properties(${hw_out} PROPERTIES
      COMPILE_OPTIONS "-Xptxas=${hw_${hw_upper}_PTXAS}")
  endif()
endmacro()
