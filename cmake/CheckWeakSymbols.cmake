# cmake -DNM=<nm> -DCAPABILITY=<AVX512> -DOBJECTS=<a.o;b.o> -P CheckWeakSymbols.cmake: fails if an object defines a weak
# symbol, unless its name says that it belongs to this instruction set: no other object defines such a symbol.
# DW.ref.* are the compiler's pointers to exception handling; they hold no code.
if(NOT OBJECTS)
  message(FATAL_ERROR "there are no objects to look at")
endif()
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX "::${CAPABILITY}::| DW\\.ref\\.")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} defines weak symbols:\n  ${weak}")
  endif()
  message(STATUS "${object}: no weak symbol of a common name")
endforeach()
