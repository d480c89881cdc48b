// The last pass over a gradient tile: blocks whose offset was raised later, and the labels' entries.
#pragma once

#include <cstdint>

#include "logitless/cpu/isa.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

template <class Real>
void finish_tile_row(const FinishTile& p, int64_t row) {
  with_type<Real>(p.tile, p.tile_dtype, row * p.tile_stride, [&](auto* tile) {
    for (int64_t j = 0, first = 0; p.factors && first < p.columns; ++j, first += p.width) {
      const Real factor = static_cast<const Real*>(p.factors)[j * p.factors_stride + row];
      if (factor != 1) rescale<Real>(tile + first, least(p.width, p.columns - first), factor);
    }
    if (p.at_target) store_some<Real>(tile + p.labels[row], splat(static_cast<const Real*>(p.at_target)[row]), 1);
  });
}

inline void finish_tile(const FinishTile& p, ParallelFor run) {
  parallel(run, p.tokens, [&](int64_t row) {
    p.tile_dtype == DType::kFloat64 ? finish_tile_row<double>(p, row) : finish_tile_row<float>(p, row);
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
