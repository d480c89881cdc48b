// Chooses the kernels for this machine, once.
#include <cstdlib>
#include <cstring>

#include "logitless/cpu/kernels.h"

namespace logitless::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("LOGITLESS_CPU_ISA");
  const auto allowed = [&](const Kernels& k) { return !wanted || !*wanted || !std::strcmp(wanted, k.name); };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed(avx512_bf16::table)) return avx512_bf16::table;
  if (avx512 && allowed(avx512::table)) return avx512::table;
  if (avx2 && allowed(avx2::table)) return avx2::table;
#endif
  return generic::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace logitless::cpu
