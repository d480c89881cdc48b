#include "logitless/cuda/pair_loss.cuh"

#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const PairLoss& op, cudaStream_t stream) {
  if (op.logps_dtype == DType::kFloat32) return launch_pair_loss<float>(op, stream);
  launch_pair_loss<double>(op, stream);
}

}  // namespace logitless::cuda
