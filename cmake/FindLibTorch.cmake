# Finds LibTorch, from a pip-installed torch or from a libtorch archive, and defines
#   LibTorch::cpu, LibTorch::cuda    targets to link (the second for a CUDA build of torch, after find_package(CUDAToolkit))
#   LibTorch_VERSION, LibTorch_LIBRARY_DIR, LibTorch_INCLUDE_DIRS, LibTorch_CUDA (whether torch is a CUDA build)
# It looks in LibTorch_ROOT, in CMAKE_PREFIX_PATH, in LibTorch_HINTS, and then for the torch of the Python interpreter.
#
# Why not find_package(Torch)? With a CUDA build of torch it refuses to configure where there is no CUDA toolkit, puts
# every CUDA library into every link line, and puts the toolkit's folder into the RPATH before the libraries that torch was
# built with. Where the caller has already found Torch, its targets are used.
if(TARGET torch_cpu)
  get_target_property(LibTorch_LIBRARY_DIR torch_cpu IMPORTED_LOCATION_RELEASE)
  cmake_path(GET LibTorch_LIBRARY_DIR PARENT_PATH LibTorch_LIBRARY_DIR)
  get_target_property(LibTorch_INCLUDE_DIRS torch INTERFACE_INCLUDE_DIRECTORIES)
  list(GET LibTorch_INCLUDE_DIRS 0 LibTorch_INCLUDE_DIR)
else()
  # torch.utils.cmake_prefix_path, which people put into CMAKE_PREFIX_PATH, is torch/share/cmake.
  set(_libtorch_include_suffixes include ../../include)
  find_path(LibTorch_INCLUDE_DIR torch/library.h PATH_SUFFIXES ${_libtorch_include_suffixes}
            NO_SYSTEM_ENVIRONMENT_PATH NO_CMAKE_SYSTEM_PATH NO_CMAKE_INSTALL_PREFIX)
  find_path(LibTorch_INCLUDE_DIR torch/library.h PATHS ${LibTorch_HINTS} PATH_SUFFIXES include NO_DEFAULT_PATH)
  if(NOT LibTorch_INCLUDE_DIR)
    find_package(Python3 QUIET COMPONENTS Interpreter)
    if(Python3_FOUND)
      # Without importing torch, which takes seconds.
      execute_process(COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                      OUTPUT_VARIABLE _libtorch_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_path(LibTorch_INCLUDE_DIR torch/library.h PATHS ${_libtorch_package} PATH_SUFFIXES include NO_DEFAULT_PATH)
    endif()
  endif()
  find_path(LibTorch_INCLUDE_DIR torch/library.h)
  if(LibTorch_INCLUDE_DIR)
    find_library(LibTorch_CPU_LIBRARY torch_cpu PATHS ${LibTorch_INCLUDE_DIR}/../lib NO_DEFAULT_PATH)
    find_library(LibTorch_CPU_LIBRARY torch_cpu)
    mark_as_advanced(LibTorch_CPU_LIBRARY)
    if(LibTorch_CPU_LIBRARY)
      cmake_path(GET LibTorch_CPU_LIBRARY PARENT_PATH LibTorch_LIBRARY_DIR)
    endif()
    set(LibTorch_INCLUDE_DIRS ${LibTorch_INCLUDE_DIR} ${LibTorch_INCLUDE_DIR}/torch/csrc/api/include)
  endif()
  mark_as_advanced(LibTorch_INCLUDE_DIR)
endif()

if(LibTorch_INCLUDE_DIR AND EXISTS ${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h)
  file(STRINGS ${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h LibTorch_VERSION REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" LibTorch_VERSION "${LibTorch_VERSION}")
  string(REPLACE ";" "." LibTorch_VERSION "${LibTorch_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch REQUIRED_VARS LibTorch_LIBRARY_DIR LibTorch_INCLUDE_DIRS VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "Install torch ('pip install torch') and activate its environment, name its Python with \
-DPython3_EXECUTABLE=..., or name the folder of torch or libtorch with -DLibTorch_ROOT=...")

if(LibTorch_FOUND)
  set(LibTorch_CUDA OFF)
  if(EXISTS ${LibTorch_LIBRARY_DIR}/libtorch_cuda.so)
    set(LibTorch_CUDA ON)
  endif()
  if(NOT TARGET LibTorch::cpu)
    find_package(Threads REQUIRED)
    set(_libtorch_prefix ${LibTorch_LIBRARY_DIR}/${CMAKE_SHARED_LIBRARY_PREFIX})
    add_library(LibTorch::cpu INTERFACE IMPORTED)
    target_include_directories(LibTorch::cpu INTERFACE ${LibTorch_INCLUDE_DIRS})
    target_compile_features(LibTorch::cpu INTERFACE cxx_std_20)
    target_link_libraries(LibTorch::cpu INTERFACE
      ${_libtorch_prefix}torch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX} ${_libtorch_prefix}c10${CMAKE_SHARED_LIBRARY_SUFFIX} Threads::Threads)
    if(LibTorch_CUDA)
      add_library(LibTorch::cuda INTERFACE IMPORTED)
      target_link_libraries(LibTorch::cuda INTERFACE LibTorch::cpu ${_libtorch_prefix}torch_cuda${CMAKE_SHARED_LIBRARY_SUFFIX}
        ${_libtorch_prefix}c10_cuda${CMAKE_SHARED_LIBRARY_SUFFIX} CUDA::cudart)
    endif()
  endif()
endif()
