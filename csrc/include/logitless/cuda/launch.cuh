// Launches of the operators' kernels, one overload per struct of logitless/ops.h. Nothing here allocates, synchronises or reads
// tensors from the host.
#pragma once

#include "logitless/cuda/platform.cuh"
#include "logitless/ops.h"

namespace logitless::cuda {

void launch(const IndexedDot& op, cudaStream_t stream);
void launch(const TilePass& op, cudaStream_t stream);
void launch(const PairLoss& op, cudaStream_t stream);
void launch(const ScaleScatter& op, cudaStream_t stream);
void launch(const ScaledConvert& op, cudaStream_t stream);
void launch(const FinishTile& op, cudaStream_t stream);

}  // namespace logitless::cuda
