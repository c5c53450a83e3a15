# CPU kernels are compiled once per instruction set and chosen when the program runs (csrc/core/cpu_dispatch.h).

option(TD_AVX512 "Build the CPU kernels with AVX-512 too, for processors that have it" ON)
set(TD_CPU_CAPABILITIES DEFAULT)
set(TD_RUNNABLE_CPU_CAPABILITIES default)  # in the words of ATEN_CPU_CAPABILITY
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND TD_CPU_CAPABILITIES AVX2)
  if(TD_AVX512)
    list(APPEND TD_CPU_CAPABILITIES AVX512)
  endif()
  # The variable is obeyed even where the processor lacks the instructions, so look before a test sets it.
  if(EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
    if(flags MATCHES " avx2 ")
      list(APPEND TD_RUNNABLE_CPU_CAPABILITIES avx2)
    endif()
    if(TD_AVX512 AND flags MATCHES " avx512f " AND flags MATCHES " avx512bw " AND flags MATCHES " avx512dq " AND flags MATCHES " avx512vl ")
      list(APPEND TD_RUNNABLE_CPU_CAPABILITIES avx512)
    endif()
  endif()
endif()

# torch's own flags for its kernels, so that at::vec has the same meaning here and there.
set(TD_FLAGS_DEFAULT "")
set(TD_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(TD_FLAGS_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512)

# td_add_cpu_kernels(<library> <file>...) adds each file to the library once per instruction set. The objects are also
# in the interface library <library>_cpu_kernels, for tests that call a kernel directly.
function(td_add_cpu_kernels library)
  add_library(${library}_cpu_kernels INTERFACE)
  foreach(capability IN LISTS TD_CPU_CAPABILITIES)
    set(objects ${library}_${capability})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE csrc)
    target_compile_definitions(${objects} PRIVATE AT_PER_OPERATOR_HEADERS CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
    # No link-time optimisation: it could move code with AVX-512 instructions to where every processor runs it.
    # psabi is a note on how vectors are passed without AVX; nobody else calls these functions.
    # The portable copy is for correctness; -O3 takes twice as long to compile it.
    target_compile_options(${objects} PRIVATE $<$<NOT:$<CONFIG:Debug>>:$<IF:$<STREQUAL:${capability},DEFAULT>,-O2,-O3>> -fno-lto -fopenmp -fno-math-errno
                                              -fno-trapping-math -Wno-psabi ${TD_FLAGS_${capability}}
                           # GCC takes the undefined lanes of its own AVX-512 intrinsics for uninitialised ones.
                           $<$<AND:$<CXX_COMPILER_ID:GNU>,$<STREQUAL:${capability},AVX512>>:-Wno-maybe-uninitialized -Wno-uninitialized>)
    # The three are one source: sanitizers look at one, or their build takes an hour of processor time.
    if(AVX2 IN_LIST TD_CPU_CAPABILITIES AND NOT capability STREQUAL AVX2)
      set_target_properties(${objects} PROPERTIES TD_UNSANITIZED ON)
    endif()
    target_link_libraries(${objects} PRIVATE LibTorch::cpu td_options)
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:${objects}>)
    target_sources(${library}_cpu_kernels INTERFACE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()

# td_add_weak_symbols_test(<library>) fails if an object with AVX instructions defines a weak symbol that another object
# could define too. Of equal weak symbols the linker keeps any one: it could give every processor the copy with AVX-512
# instructions. Unoptimised code keeps its inline functions, so only optimised objects are looked at.
function(td_add_weak_symbols_test library)
  if(CMAKE_BUILD_TYPE STREQUAL Debug OR TD_SANITIZE)
    return()
  endif()
  foreach(capability IN LISTS TD_CPU_CAPABILITIES)
    if(NOT capability STREQUAL DEFAULT)
      add_test(NAME no_weak_symbols.${capability}
               COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DCAPABILITY=${capability} "-DOBJECTS=$<TARGET_OBJECTS:${library}_${capability}>"
                       -P ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/CheckWeakSymbols.cmake)
    endif()
  endforeach()
endfunction()
