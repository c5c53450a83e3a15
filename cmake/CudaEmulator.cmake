# The CUDA kernels on an emulated device (tests/cuda/emulator): their source, unchanged, compiled as C++.

# What makes the compiler tell of every load and store. No sanitizer's library is linked: the emulator is one.
set(TD_EMULATOR_FLAGS -O1 -g -fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas
                      -fsanitize=thread,bounds,alignment,shift,signed-integer-overflow)

# td_add_emulated_cuda(<library> <kernels> <tests>) adds
#   <library>_kernels   objects: the kernels and the device
#   <library>           the whole library with these kernels in place of the CPU's, for the Python tests; not part of `all`
#   one program per test, run by ctest
function(td_add_emulated_cuda library kernels tests)
  set(emulator ${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda/emulator)
  set(units "")
  foreach(kernel IN LISTS kernels)
    # A source is CUDA or C++ in one folder, not both.
    cmake_path(GET kernel STEM name)
    set(unit ${CMAKE_CURRENT_BINARY_DIR}/emulated/${name}.cpp)
    file(CONFIGURE OUTPUT ${unit} CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${kernel}\"\n")
    list(APPEND units ${unit})
  endforeach()
  set_source_files_properties(${units} PROPERTIES COMPILE_OPTIONS "${TD_EMULATOR_FLAGS}")

  add_library(${library}_kernels OBJECT ${units} ${emulator}/simt.cpp)
  target_include_directories(${library}_kernels PUBLIC ${emulator}/include ${emulator} csrc)
  target_link_libraries(${library}_kernels PUBLIC LibTorch::cpu ${CMAKE_DL_LIBS} PRIVATE td_options)

  # Only sources with these headers (core/cuda_tensors.h is in them) differ from the library's own.
  set(again "")
  foreach(source IN LISTS sources)
    file(STRINGS ${source} includes REGEX "core/(cuda_tensors|row_divergence|row_function)\\.h")
    if(includes)
      list(APPEND again ${source})
    endif()
  endforeach()
  list(TRANSFORM again REPLACE "^.*/([^/]+/[^/]+)\\.cpp$" "/\\1[.]cpp" OUTPUT_VARIABLE objects)
  list(JOIN objects "|" objects)
  set(sources ${again})
  td_add_library(${library})
  target_sources(${library} PRIVATE $<FILTER:$<TARGET_OBJECTS:torch_divergence>,EXCLUDE,${objects}>)
  set_target_properties(${library} PROPERTIES EXCLUDE_FROM_ALL ON OUTPUT_NAME torch_divergence
                                              LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/emulated)
  target_include_directories(${library} BEFORE PRIVATE ${emulator}/include ${emulator})
  target_compile_definitions(${library} PRIVATE TD_CUDA TD_CUDA_EMULATED)
  target_link_libraries(${library} PRIVATE torch_divergence_cpu_kernels ${library}_kernels)

  foreach(file IN LISTS tests)
    cmake_path(GET file STEM name)
    add_executable(${name} ${file})
    target_link_libraries(${name} PRIVATE ${library}_kernels torch_divergence_cpu_kernels td_options GTest::gtest_main)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/tests)
    foreach(half 0 1)  # one device is one thread: two halves for two processors
      add_test(NAME ${name}.${half} COMMAND ${name})
      set_property(TEST ${name}.${half} PROPERTY LABELS cuda)
      set_property(TEST ${name}.${half} PROPERTY ENVIRONMENT GTEST_TOTAL_SHARDS=2 GTEST_SHARD_INDEX=${half})
    endforeach()
  endforeach()
endfunction()
