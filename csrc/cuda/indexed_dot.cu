#include "logitless/cuda/indexed_dot.cuh"

#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const IndexedDot& op, cudaStream_t stream) {
  switch (op.x_dtype) {
    case DType::kFloat32: return launch_indexed_dot<float>(op, stream);
    case DType::kBFloat16: return launch_indexed_dot<bfloat16>(op, stream);
    case DType::kFloat16: return launch_indexed_dot<float16>(op, stream);
    default: return launch_indexed_dot<double>(op, stream);
  }
}

}  // namespace logitless::cuda
