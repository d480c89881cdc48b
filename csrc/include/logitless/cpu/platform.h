// What the CPU kernels take from their caller: parallel loops and a small GEMM, as functions. They include no framework.
#pragma once

#include <cstdint>

namespace logitless::cpu {

// Calls fn(i, context) for i in 0 .. count, each once, in any order and on any thread.
using Task = void (*)(int64_t, void*);
using ParallelFor = void (*)(int64_t count, Task fn, void* context);

template <class F>
void parallel(ParallelFor run, int64_t count, F&& body) {
  run(count, [](int64_t i, void* context) { (*static_cast<F*>(context))(i); }, &body);
}

// C (m, n) float32 = or += A (m, k) bfloat16 * B, with k even and B in pairs of rows: (k / 2, ldb, 2).
using SmallGemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                           const uint16_t* b, float* c);

// Called before a task leaves its thread: the GEMM may hold a hardware context.
using ReleaseGemm = void (*)();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace logitless::cpu
