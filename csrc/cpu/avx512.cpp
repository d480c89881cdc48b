// The kernels for x86 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#define LOGITLESS_ISA avx512
#define LOGITLESS_VECTOR_BYTES 64
#define LOGITLESS_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"

#include "logitless/cpu/kernels.inc"

#endif
