// Element types: how they are stored, widened to float or double, and rounded back.
#pragma once

#include "ops.cuh"
#include "platform.cuh"

namespace logitless::cuda {

// Storage alone: what a kernel computes in is float or double.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
// float32, and float64 for float64 data.
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

#if !defined(LOGITLESS_CUDA_EMULATOR)
// Single instructions on sm_80 and later. The headers with the vendor's half types would double the time to compile.
__device__ inline float float16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
// Round to nearest even; `low` goes to the lower half.
__device__ inline uint32_t floats_to_bfloat16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ inline uint32_t floats_to_float16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#endif

// -- a 32-bit word of storage <-> two 16-bit elements

template <typename T>
__device__ inline void unpack_pair(uint32_t word, float& low, float& high);
template <>
__device__ inline void unpack_pair<bfloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ inline void unpack_pair<float16>(uint32_t word, float& low, float& high) {
  low = float16_to_float(static_cast<uint16_t>(word));
  high = float16_to_float(static_cast<uint16_t>(word >> 16));
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<bfloat16>(float low, float high) {
  return floats_to_bfloat16x2(low, high);
}
template <>
__device__ inline uint32_t pack_pair<float16>(float low, float high) {
  return floats_to_float16x2(low, high);
}

// -- one element

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(float16 value) { return float16_to_float(value.bits); }
__device__ inline float widen(bool value) { return value ? 1.0f : 0.0f; }

// A double goes to 16 bits by way of float, as in torch.
template <typename T, typename Acc>
__device__ inline T narrow(Acc value) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(pack_pair<T>(static_cast<float>(value), 0.0f))};
  } else {
    return static_cast<T>(value);
  }
}

// What `value` is after a trip through T, of the same type as before.
template <typename T, typename Acc>
__device__ inline Acc rounded_to(Acc value) {
  return static_cast<Acc>(widen(narrow<T>(value)));
}

// Calls `use` with a null pointer of the type that `dtype` names. The branch is the same for all threads of a launch, which is
// why an operand read or written once an element does not multiply the number of kernels.
template <typename Use>
__device__ inline void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::kFloat32: return use(static_cast<float*>(nullptr));
    case DType::kBFloat16: return use(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16: return use(static_cast<float16*>(nullptr));
    default: return use(static_cast<double*>(nullptr));
  }
}

}  // namespace logitless::cuda
