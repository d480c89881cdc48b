#include "logitless/cuda/scale.cuh"

#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const ScaleScatter& op, cudaStream_t stream) {
  if (op.values_dtype == DType::kFloat32) return launch_scale_scatter<float>(op, stream);
  launch_scale_scatter<double>(op, stream);
}

void launch(const ScaledConvert& op, cudaStream_t stream) {
  switch (op.source_dtype) {
    case DType::kFloat32: return launch_scaled_convert<float>(op, stream);
    case DType::kBFloat16: return launch_scaled_convert<bfloat16>(op, stream);
    case DType::kFloat16: return launch_scaled_convert<float16>(op, stream);
    default: return launch_scaled_convert<double>(op, stream);
  }
}

}  // namespace logitless::cuda
