// Chooses the kernels for this machine, once.
#include <cstdlib>
#include <cstring>

#include "logitless/cpu/types.h"

namespace logitless {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("LOGITLESS_CPU_ISA");
  const auto allowed = [&](const Kernels& k) { return !wanted || !*wanted || !std::strcmp(wanted, k.name); };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed(kernels_avx512_bf16)) return kernels_avx512_bf16;
  if (avx512 && allowed(kernels_avx512)) return kernels_avx512;
  if (avx2 && allowed(kernels_avx2)) return kernels_avx2;
#endif
  return kernels_generic;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace logitless
