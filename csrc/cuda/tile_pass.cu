// Kernels of tile_pass for the types of logits that GEMMs make: float32 on request, or the model's own.
#include "logitless/cuda/tile_pass.cuh"

#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const TilePass& op, cudaStream_t stream) {
  switch (op.source_dtype) {
    case DType::kFloat32: return launch_tile_pass<float>(op, stream);
    case DType::kBFloat16: return launch_tile_pass<bfloat16>(op, stream);
    case DType::kFloat16: return launch_tile_pass<float16>(op, stream);
    default: return launch_tile_pass<double>(op, stream);
  }
}

}  // namespace logitless::cuda
