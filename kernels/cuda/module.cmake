# Adds _topk_cuda, which needs no driver to be built or imported. A CUDA toolkit that is missing, old or broken stops
# the build only with GEOENGINE_CUDA=ON.
if(NOT GEOENGINE_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "GEOENGINE_CUDA must be ON, OFF or AUTO, got \"${GEOENGINE_CUDA}\"")
elseif(GEOENGINE_CUDA STREQUAL "OFF")
  return()
endif()

# OFF keeps CMake from choosing architectures of its own and remembering them as if they had been asked for.
set(geoengine_cuda_asked ON)
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(geoengine_cuda_asked OFF)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()

include(CheckLanguage)
check_language(CUDA)
set(geoengine_cuda_problem "no working CUDA compiler was found")
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit QUIET)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
    set(geoengine_cuda_problem "the CUDA compiler is of version ${CMAKE_CUDA_COMPILER_VERSION}, and 12 is needed")
  elseif(NOT TARGET CUDA::cudart_static)
    set(geoengine_cuda_problem "the CUDA toolkit has no static runtime library, cudart_static")
  else()
    set(geoengine_cuda_problem "")
  endif()
endif()
if(geoengine_cuda_problem)
  if(GEOENGINE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GEOENGINE_CUDA=ON, but ${geoengine_cuda_problem}: set CUDACXX to nvcc of CUDA 12 or later")
  endif()
  message(STATUS "Building without CUDA kernels: ${geoengine_cuda_problem}")
  return()
endif()

# Not asked otherwise, ON builds machine code for every device from compute capability 7.5 to 12.0 and PTX for later
# ones, as for a release. AUTO builds for the devices at hand, or PTX alone, which the driver translates at first use:
# 20 seconds instead of minutes. PTX below 9.0 holds no clusters, so there are two.
if(NOT geoengine_cuda_asked)
  if(GEOENGINE_CUDA STREQUAL "ON")
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100 120)
    endif()
  elseif(CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "^[0-9]+")
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  else()
    set(CMAKE_CUDA_ARCHITECTURES 75-virtual 90-virtual)
  endif()
endif()
message(STATUS "Building CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} with CUDA ${CMAKE_CUDA_COMPILER_VERSION}")

pybind11_add_module(_topk_cuda MODULE NO_EXTRAS kernels/cuda/binding.cpp kernels/cuda/topk.cu)
target_link_libraries(_topk_cuda PRIVATE CUDA::cudart_static)
set_target_properties(_topk_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
target_compile_options(_topk_cuda PRIVATE
  $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-Xcompiler=-Wall,-Wextra --threads=0>
  $<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang>:-O3 -Wall -Wextra>)
install(TARGETS _topk_cuda LIBRARY DESTINATION geoengine/kernels)
