// The last pass over dhidden: each row is scaled and gets its label's weight row.
#pragma once

#include <cstdint>

#include "logitless/cpu/isa.h"
#include "logitless/cpu/ops.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

inline void finish_rows(const FinishRows& p, ParallelFor run) {
  parallel(run, p.tokens, [&](int64_t t) {
    float* row = p.values + t * p.hidden;
    with_type<float>(p.weight, p.weight_dtype, p.labels[t] * p.weight_stride, [&](auto* w) {
      for (int64_t h = 0; h < p.hidden; h += kLanes) {
        const int some = int(least(kLanes, p.hidden - h));
        const Vec<float> label = rounded(load_some<float>(w + h, some), Rounding::kBFloat16);
        store_some<float>(row + h, load_some<float>(row + h, some) * p.scale[t] + label * p.target[t], some);
      }
    });
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
