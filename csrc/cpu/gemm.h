// What the kernels take from PyTorch. See logitless/cpu/platform.h for the meaning of each.
#pragma once

#include <cstdint>

#include "logitless/cpu/platform.h"

namespace logitless::cpu {

void run_parallel(int64_t count, Task fn, void* context);
int64_t num_threads();

// Whether oneDNN's small GEMM takes bfloat16 on this machine and returns float32.
bool has_small_gemm();
void small_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                const uint16_t* b, float* c);
void release_gemm();

}  // namespace logitless::cpu
