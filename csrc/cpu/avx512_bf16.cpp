// The kernels for x86 with AVX-512 (F, BW, DQ, VL) and its BF16 extension.
#include <type_traits>
#include <utility>

#include "logitless/cpu/types.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LOGITLESS_ISA avx512_bf16
#define LOGITLESS_AVX512_BF16
#define LOGITLESS_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#include "logitless/cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
