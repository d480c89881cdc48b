// Elements of tensors: conversion from storage to float or double, and back.
#pragma once

#include <cstdint>

#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"

namespace logitless::cuda {

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
// The type of accumulate_type(DType): double for double, else float.
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

#if !defined(LOGITLESS_CUDA_EMULATOR)
// Single instructions on sm_80 and later. cuda_fp16.h and cuda_bf16.h would double the time to compile.
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

// `value` rounded to T, in its own type.
template <typename T, typename Acc>
__device__ inline Acc rounded_to(Acc value) {
  return static_cast<Acc>(widen(narrow<T>(value)));
}

// Calls `use` with a null pointer of the type that `dtype` names. The branch is the same for all threads of a launch, so
// operands that are read or written once per element do not multiply the number of kernels.
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
