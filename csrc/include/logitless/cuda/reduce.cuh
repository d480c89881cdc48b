// Reductions over a warp and over a block, in an order fixed by the number of threads: the same bits on every run.
#pragma once

#include <cmath>

#include "logitless/cuda/math.cuh"
#include "logitless/cuda/platform.cuh"

namespace logitless::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename T>
__device__ inline T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// `kSums` sums and `kTops` maxima, to be reduced together.
template <int kSums, int kTops>
struct Reduction {
  static constexpr int kValues = kSums + kTops;
  double value[kValues];  // sums first

  __device__ inline void over_warp() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = i < kSums ? warp_sum(value[i]) : warp_max(value[i]);
  }

  // The result is valid in the first warp only. shared: kValues per warp.
  __device__ inline void over_block(double* shared) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    over_warp();
    if (warps == 1) return;
    __syncthreads();  // the first warp may still be reading the values of an earlier reduction
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) shared[warp * kValues + i] = value[i];
    }
    __syncthreads();
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = lane < warps ? shared[lane * kValues + i] : i < kSums ? 0.0 : -INFINITY;
    over_warp();
  }
};

// Maximum over the block, in every thread. shared: one value per warp.
template <typename T>
__device__ inline T block_max(T value, double* shared) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) value = larger(value, static_cast<T>(shared[w]));
  return value;
}

}  // namespace logitless::cuda
