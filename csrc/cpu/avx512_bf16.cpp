// The kernels for x86 with AVX-512 (F, BW, DQ, VL) and its BF16 extension.
#if defined(__x86_64__)

#define LOGITLESS_ISA avx512_bf16
#define LOGITLESS_AVX512_BF16
#define LOGITLESS_VECTOR_BYTES 64
#define LOGITLESS_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"

#include "logitless/cpu/kernels.inc"

#endif
