// What the kernels take from PyTorch: its thread pool and oneDNN's small GEMM. Kept apart from the bindings, whose stable
// headers exclude these.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "gemm.h"
#include "logitless/cpu/platform.h"

namespace logitless::cpu {

void run_parallel(int64_t count, Task fn, void* context) {
  // Tasks are handed out one by one: an even split would wait for the slowest core. Results do not depend on the split.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i, context);
    }
  });
}

int64_t num_threads() { return at::get_num_threads(); }

#ifdef CPUBLAS_BRGEMM_BF16BF16F32

void small_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

void release_gemm() { at::native::cpublas::brgemm_release(true); }

bool has_small_gemm() {
  // The library reports a lack of support by an exception. A product that bfloat16 cannot hold shows that C is float32.
  static const bool works = [] {
    alignas(64) uint16_t a[4] = {0x3f80, 0x3b80, 0, 0}, b[2 * 16] = {};  // 1, 2^-8
    alignas(64) float c[16] = {};
    b[0] = b[1] = 0x3f80;
    try {
      small_gemm(1, 16, 2, 2, 16, 16, false, a, b, c);
      release_gemm();
    } catch (const std::exception&) {
      return false;
    }
    return c[0] == 1.00390625f;
  }();
  return works;
}

#else

void small_gemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*, const uint16_t*, float*) {
  TORCH_CHECK(false, "this build of PyTorch has no bfloat16 brgemm");
}
void release_gemm() {}
bool has_small_gemm() { return false; }

#endif

}  // namespace logitless::cpu
