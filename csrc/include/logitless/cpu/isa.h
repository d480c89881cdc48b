// The instruction set that a translation unit compiles the kernels for.
//
// A source of csrc/cpu defines, before it includes kernels.inc: LOGITLESS_ISA, a namespace for its copy of the kernels;
// LOGITLESS_VECTOR_BYTES; and where the compiler needs to be told, LOGITLESS_TARGET, the instructions it may use. Without
// these, kernels are for any machine: 128-bit vectors, which SSE2 and NEON have and which compilers split elsewhere.
//
// Headers put their kernels into `namespace logitless::cpu::LOGITLESS_ISA`, between LOGITLESS_TARGET_BEGIN and
// LOGITLESS_TARGET_END, and include others outside of that region. No function or class of the standard library may be
// instantiated inside: the linker could merge such code with that of callers that run on machines without the instructions.
#pragma once

#if !defined(LOGITLESS_ISA)
#define LOGITLESS_ISA generic
#define LOGITLESS_VECTOR_BYTES 16
#endif

#if LOGITLESS_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define LOGITLESS_INLINE inline __attribute__((always_inline))

// Two steps, for LOGITLESS_TARGET to be expanded before it becomes part of a string.
#define LOGITLESS_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define LOGITLESS_PRAGMA(...) LOGITLESS_PRAGMA_(__VA_ARGS__)

#if !defined(LOGITLESS_TARGET)
#define LOGITLESS_TARGET_BEGIN
#define LOGITLESS_TARGET_END
#elif defined(__clang__)
#define LOGITLESS_TARGET_BEGIN \
  LOGITLESS_PRAGMA(clang attribute push(__attribute__((target(LOGITLESS_TARGET))), apply_to = function))
#define LOGITLESS_TARGET_END LOGITLESS_PRAGMA(clang attribute pop)
#else
#define LOGITLESS_TARGET_BEGIN LOGITLESS_PRAGMA(GCC push_options) LOGITLESS_PRAGMA(GCC target(LOGITLESS_TARGET))
#define LOGITLESS_TARGET_END LOGITLESS_PRAGMA(GCC pop_options)
#endif
