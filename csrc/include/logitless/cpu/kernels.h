// The table of CPU kernels, one for each instruction set, and the choice among them.
#pragma once

#include "logitless/cpu/ops.h"
#include "logitless/cpu/platform.h"
#include "logitless/ops.h"

namespace logitless::cpu {

struct Kernels {
  const char* name;
  void (*indexed_dot)(const IndexedDot&, ParallelFor);
  void (*tile_pass)(const TilePass&, ParallelFor);
  void (*scale_scatter)(const ScaleScatter&, ParallelFor);
  void (*scaled_convert)(const ScaledConvert&, ParallelFor);
  void (*finish_tile)(const FinishTile&, ParallelFor);
  void (*pack_tokens)(const Pack&, ParallelFor);
  void (*pack_rows)(const Pack&, ParallelFor);
  void (*score_block)(const ScoreBlock&, ParallelFor, SmallGemm, ReleaseGemm);
  void (*grad_hidden)(const GradHidden&, ParallelFor, SmallGemm, ReleaseGemm);
  void (*finish_rows)(const FinishRows&, ParallelFor);
  void (*grad_weight)(const GradWeight&, ParallelFor, SmallGemm, ReleaseGemm);
};

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

// The fastest that this machine runs. LOGITLESS_CPU_ISA=avx512_bf16, avx512, avx2 or generic picks another that it has.
const Kernels& kernels();

// The same code for every instruction set: its work is one exponential per pair.
void pair_loss(const PairLoss& op, ParallelFor run);

}  // namespace logitless::cpu
