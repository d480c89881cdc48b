// Element types of tensors, and how the 16-bit ones are stored.
#pragma once

#include <cstdint>

#include "logitless/macros.h"

namespace logitless {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };

// Bytes of one element.
LOGITLESS_HOST_DEVICE constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

// The type that kernels compute in, written "acc" in the comments on arguments: float64 for float64 data, else float32.
LOGITLESS_HOST_DEVICE constexpr DType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Storage of the 16-bit types. Kernels convert to float before they compute.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace logitless
