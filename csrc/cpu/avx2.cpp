// The kernels for x86 with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define LOGITLESS_ISA avx2
#define LOGITLESS_VECTOR_BYTES 32
#define LOGITLESS_TARGET "avx2,fma,f16c"

#include "logitless/cpu/kernels.inc"

#endif
