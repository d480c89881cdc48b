// The kernels for x86 with AVX2, FMA and F16C.
#include <type_traits>
#include <utility>

#include "logitless/cpu/types.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LOGITLESS_ISA avx2
#define LOGITLESS_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "logitless/cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
