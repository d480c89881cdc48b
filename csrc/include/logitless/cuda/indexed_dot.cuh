// The logit of each token's label, in float32 (float64): one warp per token.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/math.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/cuda/reduce.cuh"
#include "logitless/cuda/vector.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

constexpr int kDotThreads = 128;

template <typename X>
__global__ void __launch_bounds__(kDotThreads) indexed_dot_kernel(const IndexedDot op) {
  using Acc = Accumulate<X>;
  constexpr int kVector = kAccess / static_cast<int>(sizeof(X));
  constexpr int kVectors =
      sizeof(X) == 2 ? 2 : 4;  // in flight per operand; they are widened to float, so 4 would take 64 registers
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kDotThreads / kWarp);
  const bool same_type = op.x_dtype == op.weight_dtype;

  for (int64_t token = int64_t{blockIdx.x} * (kDotThreads / kWarp) + threadIdx.x / kWarp; token < op.tokens; token += warps) {
    const int64_t label = op.labels[token];
    // Checked by the caller; this keeps a bad label from reading out of bounds.
    if (label < 0 || label >= op.vocab) {
      if (lane == 0) static_cast<Acc*>(op.out)[token] = static_cast<Acc>(NAN);
      continue;
    }
    const X* x = static_cast<const X*>(op.x) + token * op.x_stride;
    const void* weight = static_cast<const char*>(op.weight) + label * op.weight_stride * size_of(op.weight_dtype);
    const bool x_aligned = is_aligned<X, kVector>(x);

    Acc sums[kVector] = {};  // one per element of a vector: shorter chains, less rounding
    for (int64_t start = int64_t{lane} * kVector; start < op.hidden; start += int64_t{kVectors} * kWarp * kVector) {
      Acc a[kVectors][kVector], b[kVectors][kVector];
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const int64_t column = start + int64_t{u} * kWarp * kVector;
        load<X, kVector>(x, column, op.hidden, x_aligned, a[u]);
        load_any(weight, op.weight_dtype, column, op.hidden, b[u]);
      }
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[i] = fused_multiply_add(a[u][i], same_type ? b[u][i] : rounded_to<X>(b[u][i]), sums[i]);
        }
      }
    }
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += sums[i];
    sum = warp_sum(sum);
    if (lane == 0) {
      if (op.bias != nullptr) {
        Acc bias[1];
        with_type(op.bias_dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          bias[0] = static_cast<Acc>(widen(static_cast<const T*>(op.bias)[label]));
        });
        sum += bias[0];
      }
      static_cast<Acc*>(op.out)[token] = op.rounded ? rounded_to<X>(sum) : sum;
    }
  }
}

template <typename X>
void launch_indexed_dot(const IndexedDot& op, cudaStream_t stream) {
  auto* kernel = indexed_dot_kernel<X>;
  LOGITLESS_LAUNCH(kernel, blocks_for(op.tokens, kDotThreads / kWarp), kDotThreads, stream, op);
}

}  // namespace logitless::cuda
