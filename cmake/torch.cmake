# torch as files: headers, libraries and the version as text. Nothing of it is imported or run.
#
# Defines TURBOQUANT_TORCH_VERSION, TURBOQUANT_TORCH_CUDA (the CUDA version torch was built with,
# empty for a CPU build) and the interface targets torch_stable_cpu and torch_stable_cuda.

if(NOT EXISTS "${TURBOQUANT_TORCH}/version.py")
  message(FATAL_ERROR "turboquant: no installed torch at TURBOQUANT_TORCH='${TURBOQUANT_TORCH}'. "
    "Install torch >= 2.10 first, then build with pip, which finds it.")
endif()
file(READ "${TURBOQUANT_TORCH}/version.py" version_text)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${version_text}")
set(TURBOQUANT_TORCH_VERSION "${CMAKE_MATCH_1}")
set(TURBOQUANT_TORCH_CUDA "")
if(version_text MATCHES "cuda: [^=]*= '([^']+)'")
  set(TURBOQUANT_TORCH_CUDA "${CMAKE_MATCH_1}")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${TURBOQUANT_TORCH_VERSION}")
if(torch_release VERSION_LESS 2.10)
  message(FATAL_ERROR "turboquant needs torch >= 2.10, found ${TURBOQUANT_TORCH_VERSION}")
endif()
message(STATUS "torch ${TURBOQUANT_TORCH_VERSION}, CUDA '${TURBOQUANT_TORCH_CUDA}'")

add_library(torch_stable_cpu INTERFACE)
target_include_directories(torch_stable_cpu SYSTEM INTERFACE "${TURBOQUANT_TORCH}/include")
# The oldest torch whose stable ABI is used; newer functions are then not even declared.
target_compile_definitions(torch_stable_cpu INTERFACE TORCH_TARGET_VERSION=0x020A000000000000)
target_link_libraries(torch_stable_cpu INTERFACE "${TURBOQUANT_TORCH}/lib/libtorch_cpu.so")

# A CPU build of torch has no libtorch_cuda.so to link with; a stub of that name, never installed,
# stands in for it, so that CUDA libraries can be built on any machine.
function(turboquant_link_torch_cuda)
  add_library(torch_stable_cuda INTERFACE)
  target_link_libraries(torch_stable_cuda INTERFACE torch_stable_cpu)
  target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
  if(EXISTS "${TURBOQUANT_TORCH}/lib/libtorch_cuda.so")
    target_link_libraries(torch_stable_cuda INTERFACE "${TURBOQUANT_TORCH}/lib/libtorch_cuda.so")
  else()
    add_library(torch_cuda_stub SHARED cmake/torch_cuda_stub.cpp)
    set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda)
    target_link_libraries(torch_stable_cuda INTERFACE torch_cuda_stub)
  endif()
endfunction()
