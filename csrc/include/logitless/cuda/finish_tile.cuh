// The last pass over a gradient tile: blocks whose offset was raised later, and the labels' entries.
//
// One thread block per row. Few rows are raised, so most are done after reading their factors.
#pragma once

#include <cstdint>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/cuda/vector.cuh"
#include "logitless/ops.h"

namespace logitless::cuda {

constexpr int kFinishThreads = 256;
constexpr int kFinishVector = 8;  // 16 bytes of a 16-bit type per thread, 2048 threads per SM: 32 kB in flight

// row[i] *= factor for i < count, by all threads of a block.
template <typename T>
__device__ inline void scale_columns(T* row, int count, Accumulate<T> factor) {
  const bool aligned = is_aligned<T, kFinishVector>(row);
#pragma unroll 1
  for (int column = static_cast<int>(threadIdx.x) * kFinishVector; column < count; column += kFinishThreads * kFinishVector) {
    Accumulate<T> values[kFinishVector];
    load<T, kFinishVector>(row, column, count, aligned, values);
#pragma unroll
    for (int i = 0; i < kFinishVector; ++i) values[i] *= factor;
    store<T, kFinishVector>(row, column, count, aligned, values);
  }
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_tile_kernel(const FinishTile op) {
  using Acc = Accumulate<T>;
  const int columns = static_cast<int>(op.columns);
  const int width = op.width < op.columns ? static_cast<int>(op.width) : columns;
  for (int64_t row = blockIdx.x; row < op.tokens; row += gridDim.x) {
    T* tile = static_cast<T*>(op.tile) + row * op.tile_stride;
    if (op.factors != nullptr) {
      const Acc* factors = static_cast<const Acc*>(op.factors) + row;
      bool scaled = false;
      for (int block = static_cast<int>(threadIdx.x); block < op.blocks; block += kFinishThreads) {
        scaled |= factors[block * op.factors_stride] != 1;
      }
      if (__syncthreads_or(scaled)) {
#pragma unroll 1
        for (int first = 0; first < columns; first += width, factors += op.factors_stride) {
          const Acc factor = *factors;
          if (factor != 1) scale_columns(tile + first, columns - first < width ? columns - first : width, factor);
        }
        __syncthreads();  // another thread may be multiplying the label's entry
      }
    }
    if (op.at_target != nullptr && threadIdx.x == 0) {
      const int64_t label = op.labels[row];
      // checked by the caller; this keeps a bad label from writing out of bounds
      if (label >= 0 && label < op.columns) tile[label] = narrow<T>(static_cast<const Acc*>(op.at_target)[row]);
    }
  }
}

template <typename T>
void launch_finish_tile(const FinishTile& op, cudaStream_t stream) {
  auto* kernel = finish_tile_kernel<T>;
  LOGITLESS_LAUNCH(kernel, blocks_for(op.tokens, 1), kFinishThreads, stream, op);
}

}  // namespace logitless::cuda
