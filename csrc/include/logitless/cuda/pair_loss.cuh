// Sequence log-probs, the pair loss and the coefficient of every token in one launch: one block per pair.
#pragma once

#include <cstdint>
#include <type_traits>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/cuda/reduce.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"
#include "logitless/pair_loss.h"

namespace logitless::cuda {

constexpr int kPairThreads = 512;

__device__ inline double weight_at(const void* weights, DType dtype, int64_t token) {
  if (weights == nullptr) return 1;
  if (dtype == DType::kBool) return widen(static_cast<const bool*>(weights)[token]);
  double weight = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    weight = static_cast<double>(widen(static_cast<const T*>(weights)[token]));
  });
  return weight;
}

template <typename Acc>
__global__ void __launch_bounds__(kPairThreads) pair_loss_kernel(const PairLoss op) {
  __shared__ double shared[kPairThreads / kWarp * 2];
  __shared__ double slope;
  const auto* logps = static_cast<const Acc*>(op.logps);
  auto* coefficients = static_cast<Acc*>(op.coefficients);

  for (int64_t pair = blockIdx.x; pair < op.pairs; pair += gridDim.x) {
    int64_t begin[2], end[2];
    Reduction<2, 0> sequence;
    for (int side = 0; side < 2; ++side) {
      begin[side] = op.offsets[2 * pair + side];
      end[side] = op.offsets[2 * pair + side + 1];
      double sum = 0;
      for (int64_t token = begin[side] + threadIdx.x; token < end[side]; token += kPairThreads) {
        const double weight = weight_at(op.weights, op.weights_dtype, token);
        if (weight != 0) sum += weight * static_cast<double>(logps[token]);  // NaN * 0 is not 0
      }
      sequence.value[side] = sum;
    }
    sequence.over_block(shared);
    if (threadIdx.x == 0) {
      double delta = 0;
      for (int side = 0; side < 2; ++side) {
        const int64_t length = end[side] - begin[side];
        double value = sequence.value[side];
        if (op.mean && length > 0) value /= static_cast<double>(length);
        op.sequence_logps[2 * pair + side] = value;
        delta += side == 0 ? value : -value;
      }
      if (op.ref_logps != nullptr) delta -= op.ref_logps[2 * pair] - op.ref_logps[2 * pair + 1];
      const PairLossValue value = pair_loss_value(op.loss, delta);
      op.losses[pair] = value.loss;
      slope = value.slope * op.scale;
    }
    if (coefficients == nullptr) continue;
    __syncthreads();
    for (int side = 0; side < 2; ++side) {
      double unit = side == 0 ? slope : -slope;
      if (op.mean) unit /= static_cast<double>(end[side] - begin[side]);  // not used for an empty sequence
      for (int64_t token = begin[side] + threadIdx.x; token < end[side]; token += kPairThreads) {
        const double weight = weight_at(op.weights, op.weights_dtype, token);
        coefficients[token] = static_cast<Acc>(weight != 0 ? unit * weight : 0.0);
      }
    }
  }
}

template <typename Acc>
void launch_pair_loss(const PairLoss& op, cudaStream_t stream) {
  auto* kernel = pair_loss_kernel<Acc>;
  LOGITLESS_LAUNCH(kernel, blocks_for(op.pairs, 1), kPairThreads, stream, op);
}

}  // namespace logitless::cuda
