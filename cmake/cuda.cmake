# Whether the CUDA kernels are built, and for which architectures.
#
# Reads TURBOQUANT_CUDA (auto, on, off; the cache variable, else the environment variable) and
# defines TURBOQUANT_BUILD_CUDA, TURBOQUANT_CUDA_REASON, TURBOQUANT_ARCHS, TURBOQUANT_GENCODE.
#
# auto builds them when torch is a CUDA build, nvcc is there, and there is something to build for:
# an architecture list that the user gave, or a GPU in this machine. A machine without a GPU must
# not spend half an hour on architectures that nobody asked for.

if(DEFINED ENV{TURBOQUANT_CUDA})
  set(TURBOQUANT_CUDA "$ENV{TURBOQUANT_CUDA}")
endif()
string(TOLOWER "${TURBOQUANT_CUDA}" TURBOQUANT_CUDA)
if(NOT TURBOQUANT_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "TURBOQUANT_CUDA must be auto, on or off, got '${TURBOQUANT_CUDA}'")
endif()

# TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX", what torch's own extensions read), else
# CMAKE_CUDA_ARCHITECTURES ("80;90a"), else the GPUs of this machine.
set(TURBOQUANT_ARCHS "")
if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  string(REGEX REPLACE "[ ,]+" ";" TURBOQUANT_ARCHS "$ENV{TORCH_CUDA_ARCH_LIST}")
  string(REPLACE "." "" TURBOQUANT_ARCHS "${TURBOQUANT_ARCHS}")
elseif(CMAKE_CUDA_ARCHITECTURES)
  set(TURBOQUANT_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
elseif(DEFINED ENV{CUDAARCHS})
  set(TURBOQUANT_ARCHS "$ENV{CUDAARCHS}")
else()
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE gpus ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(NOT failed AND gpus MATCHES "^[0-9]")
    string(REPLACE "\n" ";" TURBOQUANT_ARCHS "${gpus}")
    string(REPLACE "." "" TURBOQUANT_ARCHS "${TURBOQUANT_ARCHS}")
  endif()
endif()
list(REMOVE_DUPLICATES TURBOQUANT_ARCHS)
# wgmma and its like exist only under the architecture-specific names.
list(TRANSFORM TURBOQUANT_ARCHS REPLACE "^90(\\+PTX)?$" "90a")

find_program(TURBOQUANT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)

set(TURBOQUANT_BUILD_CUDA OFF)
if(TURBOQUANT_CUDA STREQUAL off)
  set(TURBOQUANT_CUDA_REASON "switched off by TURBOQUANT_CUDA=off")
elseif(NOT TURBOQUANT_NVCC)
  set(TURBOQUANT_CUDA_REASON "no nvcc found: install the CUDA toolkit")
elseif(TURBOQUANT_CUDA STREQUAL auto AND NOT TURBOQUANT_TORCH_CUDA)
  set(TURBOQUANT_CUDA_REASON "the installed torch is a CPU build")
elseif(TURBOQUANT_CUDA STREQUAL auto AND NOT TURBOQUANT_ARCHS)
  set(TURBOQUANT_CUDA_REASON
    "no GPU in this machine and no TORCH_CUDA_ARCH_LIST: nothing to build for")
else()
  set(TURBOQUANT_BUILD_CUDA ON)
  set(TURBOQUANT_CUDA_REASON "")
endif()
if(NOT TURBOQUANT_BUILD_CUDA)
  set(TURBOQUANT_ARCHS "")
  if(TURBOQUANT_CUDA STREQUAL on)
    message(FATAL_ERROR "TURBOQUANT_CUDA=on, but: ${TURBOQUANT_CUDA_REASON}")
  endif()
  message(NOTICE "turboquant: building WITHOUT CUDA kernels (${TURBOQUANT_CUDA_REASON})")
  return()
endif()

if(NOT TURBOQUANT_ARCHS)  # asked for, with no GPU in sight: what release wheels have
  set(TURBOQUANT_ARCHS 80 90a 100f 120f+PTX)
endif()
# By hand, because CMake 3.25 refuses the family names ("100f").
set(TURBOQUANT_GENCODE "")
foreach(arch IN LISTS TURBOQUANT_ARCHS)
  string(REGEX REPLACE "\\+PTX$" "" number "${arch}")
  list(APPEND TURBOQUANT_GENCODE "SHELL:-gencode arch=compute_${number},code=sm_${number}")
  if(arch MATCHES "\\+PTX$")
    list(APPEND TURBOQUANT_GENCODE "SHELL:-gencode arch=compute_${number},code=compute_${number}")
  endif()
endforeach()
list(JOIN TURBOQUANT_ARCHS " " TURBOQUANT_ARCHS)
message(NOTICE "turboquant: building CUDA kernels for ${TURBOQUANT_ARCHS}")

set(CMAKE_CUDA_COMPILER "${TURBOQUANT_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked by name below
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit REQUIRED)  # its headers, for the one C++ file that launches
turboquant_link_torch_cuda()
target_link_libraries(torch_stable_cuda INTERFACE CUDA::cudart_static)
