// The test's extension: bindings, launch code and kernels as they are, with the emulator in place of CUDA.
#include "csrc/cuda/bindings.cpp"
#include "csrc/cuda/finish_tile.cu"
#include "csrc/cuda/indexed_dot.cu"
#include "csrc/cuda/pair_loss.cu"
#include "csrc/cuda/scale.cu"
#include "csrc/cuda/tile_pass.cu"

// Whose turn it is first among the threads of a block: 0 ascending, 1 descending, else the seed of a shuffle.
extern "C" void logitless_emulator_order(unsigned order) { logitless::emulator::machine.order = order; }
