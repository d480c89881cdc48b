#include "logitless/cuda/pair_loss.cuh"

namespace logitless::cuda {

void launch(const PairLossPass& op, cudaStream_t stream) {
  if (op.logps_dtype == DType::kFloat32) return launch_pair_loss<float>(op, stream);
  launch_pair_loss<double>(op, stream);
}

}  // namespace logitless::cuda
