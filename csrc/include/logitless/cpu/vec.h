// Vectors of one instruction set and their arithmetic, by the vector extension of GCC and Clang: the same source for AVX-512,
// AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>

#include "logitless/cpu/isa.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = LOGITLESS_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(LOGITLESS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(LOGITLESS_VECTOR_BYTES)));
  static constexpr int mantissa = 23, exponent_bias = 127;
  static constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float lowest = -87.0f, highest = 88.0f;  // exp is a normal number in between
};

template <>
struct Lanes<double> {
  static constexpr int count = LOGITLESS_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(LOGITLESS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(LOGITLESS_VECTOR_BYTES)));
  static constexpr int mantissa = 52, exponent_bias = 1023;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.0, highest = 709.0;
};

template <class Real>
using Vec = typename Lanes<Real>::V;
template <class Real>
using Int = typename Lanes<Real>::I;

template <class Real>
LOGITLESS_INLINE Vec<Real> splat(Real x) {
  return x - Vec<Real>{};
}

// a * b + c, rounded once where the machine can. Sources are compiled without contraction: if the compiler chose which products
// to fuse, a log-probability could change with the metrics that a loop computes beside it.
template <class V>
LOGITLESS_INLINE V fma(V a, V b, V c) {
#if LOGITLESS_VECTOR_BYTES == 64
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif LOGITLESS_VECTOR_BYTES == 32
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, times r^2, plus r: float32 by a minimax fit (relative error of exp 3e-9),
// float64 by Taylor's series, whose remainder is below rounding.
LOGITLESS_INLINE Vec<float> expm1_near_0(Vec<float> r) {
  Vec<float> q = fma(r, splat(1.381458095e-03f), splat(8.368725485e-03f));
  q = fma(q, r, splat(4.166838888e-02f));
  q = fma(q, r, splat(1.666652056e-01f));
  q = fma(q, r, splat(4.999999344e-01f));
  return fma(q, r * r, r);
}

LOGITLESS_INLINE Vec<double> expm1_near_0(Vec<double> r) {
  constexpr double inverse_factorial[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                          1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Vec<double> q = splat(inverse_factorial[11]);
  for (int i = 10; i >= 0; --i) q = fma(q, r, splat(inverse_factorial[i]));
  return fma(q, r * r, r);
}

template <class Real>
struct Exponential {
  Vec<Real> m;      // exp(x) - 1 = m * power + (power - 1)
  Vec<Real> power;  // 2^n
};

// x between lowest and highest.
template <class Real>
LOGITLESS_INLINE Exponential<Real> split_exp(Vec<Real> x) {
  using L = Lanes<Real>;
  const Vec<Real> t = fma(x, splat(Real(1.44269504088896340736)), splat(L::magic));
  const Vec<Real> n = t - L::magic;
  const Vec<Real> r = fma(n, splat(-L::ln2_lo), fma(n, splat(-L::ln2_hi), x));
  // the low bits of t are those of n; the shift drops the rest
  const Int<Real> bits = ((Int<Real>)t + L::exponent_bias) << L::mantissa;
  return {expm1_near_0(r), (Vec<Real>)bits};
}

// exp(x): 0 below lowest (subnormal results included), finite above highest, NaN for NaN.
template <class Real>
LOGITLESS_INLINE Vec<Real> exp(Vec<Real> x) {
  using L = Lanes<Real>;
  Vec<Real> y = x > L::highest ? splat(L::highest) : x;
  y = y < L::lowest ? splat(L::lowest) : y;
  const Exponential<Real> e = split_exp<Real>(y);
  const Vec<Real> result = fma(e.m, e.power, e.power);
  return x < L::lowest ? splat(Real(0)) : result;
}

#if LOGITLESS_VECTOR_BYTES == 64
// With AVX-512's instructions: subnormal results are included, and above highest it may also be infinite or NaN.
template <>
LOGITLESS_INLINE Vec<float> exp<float>(Vec<float> x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.0f), (__m512)x);  // in this order NaN stays
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  // n * ln(2) is off by n * 2e-9, since the product is not rounded
  const Vec<float> r = (Vec<float>)_mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), y);
  return (Vec<float>)_mm512_scalef_ps((__m512)(expm1_near_0(r) + 1.0f), n);
}
#endif

// tanh(x), and 1 - tanh(x)^2 without cancellation.
template <class Real>
LOGITLESS_INLINE Vec<Real> tanh(Vec<Real> x, Vec<Real>& slope) {
  using L = Lanes<Real>;
  const Vec<Real> twice = x < 0 ? x + x : -(x + x);  // -2 |x|
  const Exponential<Real> e = split_exp<Real>(twice < L::lowest ? splat(L::lowest) : twice);
  const Vec<Real> m = fma(e.m, e.power, e.power - Real(1));  // exp(-2 |x|) - 1
  const Vec<Real> p = fma(e.m, e.power, e.power);
  const Vec<Real> sum = m + Real(2);
  slope = (p * Real(4)) / (sum * sum);
  const Vec<Real> t = -m / sum;
  return x < 0 ? -t : t;
}

// Vectors of float's lanes: 16-bit elements as bits, and 32-bit words.
constexpr int kLanes = Lanes<float>::count;
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
LOGITLESS_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
LOGITLESS_INLINE void store_bits(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class Real>
LOGITLESS_INLINE Real sum_lanes(Vec<Real> x) {
  Real total = 0;
  for (int i = 0; i < Lanes<Real>::count; ++i) total += x[i];
  return total;
}

template <class Real>
LOGITLESS_INLINE Real max_lanes(Vec<Real> x) {
  Real top = x[0];
  for (int i = 1; i < Lanes<Real>::count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class Real>
LOGITLESS_INLINE Vec<Real> larger(Vec<Real> a, Vec<Real> b) {
  return a > b ? a : b;
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
