// Vectors of one instruction set, by the vector extension of GCC and Clang: the same source for AVX-512, AVX2, SSE2 and NEON.
// Included inside of a namespace and of a target region (see kernels.inc), so it includes nothing itself.

#define LOGITLESS_INLINE inline __attribute__((always_inline))

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

// a * b + c, rounded once where the machine can. Compiled without contraction: which products are fused must not depend on what
// else a loop computes, or a log-probability would change with the metrics that are asked for.
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
// The same, subnormal results included, with the instructions for it. Above highest it may also be infinite or NaN.
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

// 16-bit floats, as bits.
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

LOGITLESS_INLINE Vec<float> bf16_to_float(Half h) { return (Vec<float>)(__builtin_convertvector(h, Word) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
LOGITLESS_INLINE Half float_to_bf16(Vec<float> x) {
  const Word bits = (Word)x;
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x != x ? (Word)(0x7fc0u - Word{}) : rounded, Half);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  uint32_t bits = sign;
  float out;
  if (exponent == 0x1f) {
    bits |= 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits |= ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa * 2^-24
    out = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -out : out;
  }
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000u) {                       // subnormal: the addition rounds to a multiple of 2^-24
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y += 0.5f;
    __builtin_memcpy(&bits, &y, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

LOGITLESS_INLINE Vec<float> fp16_to_float(Half h) {
#if LOGITLESS_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif LOGITLESS_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(h[i]);
  return out;
#endif
}

LOGITLESS_INLINE Half float_to_fp16(Vec<float> x) {
#if LOGITLESS_VECTOR_BYTES == 64
  return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif LOGITLESS_VECTOR_BYTES == 32
  return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  Half out;
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_half(x[i]);
  return out;
#endif
}

// Memory formats: load and store a vector of Real, or its first `count` lanes.
struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

template <class Real, class T>
struct Memory;

template <class Real>
struct Memory<Real, Real> {
  LOGITLESS_INLINE static Vec<Real> load(const Real* p) { return load_bits<Vec<Real>>(p); }
  LOGITLESS_INLINE static void store(Real* p, Vec<Real> x) { store_bits(p, x); }
};

template <>
struct Memory<float, BF16> {
  LOGITLESS_INLINE static Vec<float> load(const BF16* p) { return bf16_to_float(load_bits<Half>(p)); }
  LOGITLESS_INLINE static void store(BF16* p, Vec<float> x) { store_bits(p, float_to_bf16(x)); }
};

template <>
struct Memory<float, FP16> {
  LOGITLESS_INLINE static Vec<float> load(const FP16* p) { return fp16_to_float(load_bits<Half>(p)); }
  LOGITLESS_INLINE static void store(FP16* p, Vec<float> x) { store_bits(p, float_to_fp16(x)); }
};

// An entry of the gradient tile: the instruction for bf16 flushes subnormal numbers to 0, which there nobody misses.
template <class Real, class T>
LOGITLESS_INLINE void store_entry(T* p, Vec<Real> x) {
  Memory<Real, T>::store(p, x);
}
#ifdef LOGITLESS_AVX512_BF16
template <>
LOGITLESS_INLINE void store_entry<float, BF16>(BF16* p, Vec<float> x) {
  store_bits(p, _mm512_cvtneps_pbh((__m512)x));
}
#endif

template <class Real, class T>
LOGITLESS_INLINE Vec<Real> load_some(const T* p, int count) {
  T padded[Lanes<Real>::count] = {};
  __builtin_memcpy(padded, p, count * sizeof(T));
  return Memory<Real, T>::load(padded);
}

template <class Real, class T>
LOGITLESS_INLINE void store_some(T* p, Vec<Real> x, int count) {
  T padded[Lanes<Real>::count];
  Memory<Real, T>::store(padded, x);
  __builtin_memcpy(p, padded, count * sizeof(T));
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
