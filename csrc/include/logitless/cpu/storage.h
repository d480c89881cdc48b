// Elements of tensors in memory: their types, conversion to and from vectors of float or double, and whole rows at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "logitless/cpu/isa.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

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
template <class Real, class T>
struct Memory;

template <class Real>
struct Memory<Real, Real> {
  LOGITLESS_INLINE static Vec<Real> load(const Real* p) { return load_bits<Vec<Real>>(p); }
  LOGITLESS_INLINE static void store(Real* p, Vec<Real> x) { store_bits(p, x); }
};

template <>
struct Memory<float, bfloat16> {
  LOGITLESS_INLINE static Vec<float> load(const bfloat16* p) { return bf16_to_float(load_bits<Half>(p)); }
  LOGITLESS_INLINE static void store(bfloat16* p, Vec<float> x) { store_bits(p, float_to_bf16(x)); }
};

template <>
struct Memory<float, float16> {
  LOGITLESS_INLINE static Vec<float> load(const float16* p) { return fp16_to_float(load_bits<Half>(p)); }
  LOGITLESS_INLINE static void store(float16* p, Vec<float> x) { store_bits(p, float_to_fp16(x)); }
};

// An entry of the gradient tile. The bf16 instruction flushes subnormal numbers to 0, which is negligible there.
template <class Real, class T>
LOGITLESS_INLINE void store_entry(T* p, Vec<Real> x) {
  Memory<Real, T>::store(p, x);
}
#ifdef LOGITLESS_AVX512_BF16
template <>
LOGITLESS_INLINE void store_entry<float, bfloat16>(bfloat16* p, Vec<float> x) {
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

constexpr int kChunk = 1024;  // elements of a row that kernels work on at a time, in the L1 cache

LOGITLESS_INLINE Vec<float> rounded(Vec<float> r, Rounding rounding) {
  if (rounding == Rounding::kBFloat16) return bf16_to_float(float_to_bf16(r));
  if (rounding == Rounding::kFloat16) return fp16_to_float(float_to_fp16(r));
  return r;
}
LOGITLESS_INLINE Vec<double> rounded(Vec<double> r, Rounding) { return r; }

// Rounding to the elements' type.
inline Rounding rounding_to(DType type) {
  return type == DType::kBFloat16 ? Rounding::kBFloat16 : type == DType::kFloat16 ? Rounding::kFloat16 : Rounding::kNone;
}

template <class Real, class T>
inline void widen(const T* from, Real* to, int64_t count) {
  constexpr int lanes = Lanes<Real>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_bits(to + i, Memory<Real, T>::load(from + i));
  if (i < count) store_bits(to + i, load_some<Real>(from + i, int(count - i)));
}

template <class Real, class T>
inline void narrow(const Real* from, T* to, int64_t count) {
  constexpr int lanes = Lanes<Real>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) Memory<Real, T>::store(to + i, load_bits<Vec<Real>>(from + i));
  if (i < count) store_some<Real>(to + i, load_bits<Vec<Real>>(from + i), int(count - i));
}

// Calls f with a typed pointer to element `offset`.
template <class Real, class F>
LOGITLESS_INLINE void with_type(void* base, DType type, int64_t offset, F&& f) {
  if constexpr (sizeof(Real) == 8) {
    f(static_cast<double*>(base) + offset);
  } else {
    switch (type) {
      case DType::kBFloat16: f(static_cast<bfloat16*>(base) + offset); break;
      case DType::kFloat16: f(static_cast<float16*>(base) + offset); break;
      default: f(static_cast<float*>(base) + offset);
    }
  }
}

template <class Real, class F>
LOGITLESS_INLINE void with_type(const void* base, DType type, int64_t offset, F&& f) {
  with_type<Real>(const_cast<void*>(base), type, offset, static_cast<F&&>(f));
}

// row[i] *= factor
template <class Real, class T>
inline void rescale(T* row, int64_t count, Real factor) {
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t i = 0; i < count; i += lanes) {
    const int some = int(count - i < lanes ? count - i : lanes);
    store_some<Real>(row + i, load_some<Real>(row + i, some) * factor, some);
  }
}

// `count` elements of `from`, from `offset` on, as bfloat16.
inline void to_bf16(const void* from, DType type, int64_t offset, int64_t count, uint16_t* to) {
  bfloat16* out = reinterpret_cast<bfloat16*>(to);
  with_type<float>(from, type, offset, [&](auto* row) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(row)>>;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Memory<float, bfloat16>::store(out + i, Memory<float, T>::load(row + i));
    if (i < count) store_some<float>(out + i, load_some<float>(row + i, int(count - i)), int(count - i));
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
