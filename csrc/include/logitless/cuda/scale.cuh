// Rows scaled and scattered, and whole tensors scaled and converted, by a factor in device memory.
#pragma once

#include <cstdint>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/cuda/vector.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

constexpr int kScaleThreads = 256;
constexpr int kScaleVector = 8;  // one 16-byte store of a 16-bit type, two 16-byte loads of float32

template <typename Value>
__global__ void __launch_bounds__(kScaleThreads) scale_scatter_kernel(const ScaleScatter op) {
  for (int64_t i = blockIdx.x; i < op.tokens; i += gridDim.x) {
    const int64_t row = op.rows[i];
    if (row < 0 || row >= op.out_rows) continue;  // checked by the caller; keeps a bad row from writing out of bounds
    const Value factor = static_cast<const Value*>(op.factor)[i * op.factor_stride];
    const Value* values = static_cast<const Value*>(op.values) + i * op.values_stride;
    void* out = static_cast<char*>(op.out) + row * op.out_stride * size_of(op.out_dtype);
    const bool aligned = is_aligned<Value, kScaleVector>(values);
    for (int64_t column = int64_t{threadIdx.x} * kScaleVector; column < op.hidden; column += kScaleThreads * kScaleVector) {
      Value scaled[kScaleVector];
      load<Value, kScaleVector>(values, column, op.hidden, aligned, scaled);
#pragma unroll
      for (int v = 0; v < kScaleVector; ++v) scaled[v] *= factor;
      store_any(out, op.out_dtype, column, op.hidden, scaled);
    }
  }
}

template <typename Source>
__global__ void __launch_bounds__(kScaleThreads) scaled_convert_kernel(const ScaledConvert op) {
  using Acc = Accumulate<Source>;
  const Acc factor = *static_cast<const Acc*>(op.factor);
  const auto* source = static_cast<const Source*>(op.source);
  const bool aligned = is_aligned<Source, kScaleVector>(source);
  const int64_t step = int64_t{gridDim.x} * kScaleThreads * kScaleVector;
  for (int64_t at = (int64_t{blockIdx.x} * kScaleThreads + threadIdx.x) * kScaleVector; at < op.count; at += step) {
    Acc scaled[kScaleVector];
    load<Source, kScaleVector>(source, at, op.count, aligned, scaled);
#pragma unroll
    for (int v = 0; v < kScaleVector; ++v) scaled[v] *= factor;
    store_any(op.out, op.out_dtype, at, op.count, scaled);
  }
}

template <typename Value>
void launch_scale_scatter(const ScaleScatter& op, cudaStream_t stream) {
  auto* kernel = scale_scatter_kernel<Value>;
  LOGITLESS_LAUNCH(kernel, blocks_for(op.tokens, 1), kScaleThreads, stream, op);
}

template <typename Source>
void launch_scaled_convert(const ScaledConvert& op, cudaStream_t stream) {
  auto* kernel = scaled_convert_kernel<Source>;
  LOGITLESS_LAUNCH(kernel, blocks_for(op.count, kScaleThreads * kScaleVector), kScaleThreads, stream, op);
}

}  // namespace logitless::cuda
