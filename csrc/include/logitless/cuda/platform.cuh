// The platform of the kernels: nvcc, or the tests' emulator, which runs the same source on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(LOGITLESS_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

// The kernel is handed in as a function pointer: a template's commas would split the macro's arguments.
#define LOGITLESS_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif

namespace logitless::cuda {

constexpr int kWarp = 32;

// Blocks stride over rows, so any number of rows works. This many keep every device busy and the last wave short.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

inline unsigned blocks_for(int64_t work, int64_t work_per_block) {
  const int64_t blocks = (work + work_per_block - 1) / work_per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace logitless::cuda
