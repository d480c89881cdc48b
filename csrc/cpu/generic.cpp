// The kernels for any machine: 128-bit vectors, which SSE2 and NEON have and which compilers split where nothing has.
#include <type_traits>
#include <utility>

#include "logitless/cpu/types.h"

#define LOGITLESS_ISA generic
#define LOGITLESS_VECTOR_BYTES 16

#include "logitless/cpu/kernels.inc"
