#include "logitless/cuda/finish_tile.cuh"

#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const FinishTile& op, cudaStream_t stream) {
  switch (op.tile_dtype) {
    case DType::kFloat32: return launch_finish_tile<float>(op, stream);
    case DType::kBFloat16: return launch_finish_tile<bfloat16>(op, stream);
    case DType::kFloat16: return launch_finish_tile<float16>(op, stream);
    default: return launch_finish_tile<double>(op, stream);
  }
}

}  // namespace logitless::cuda
