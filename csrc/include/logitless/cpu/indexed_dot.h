// The logit of each token's label, in float32 (float64): one task per token.
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
void indexed_dot_row(const IndexedDot& p, int64_t t) {
  constexpr int lanes = Lanes<Real>::count;
  alignas(64) Real a[kChunk], b[kChunk];
  const int64_t label = p.labels[t];
  double total = 0;
  for (int64_t h = 0; h < p.hidden; h += kChunk) {
    const int64_t count = least(kChunk, p.hidden - h);
    with_type<Real>(p.x, p.x_dtype, t * p.x_stride + h, [&](auto* x) { widen<Real>(x, a, count); });
    if (p.weight_dtype == DType::kFloat64 && sizeof(Real) == 4) {
      const double* w = static_cast<const double*>(p.weight) + label * p.weight_stride + h;
      for (int64_t i = 0; i < count; ++i) b[i] = Real(w[i]);
    } else if (p.weight_dtype != DType::kFloat64 && sizeof(Real) == 8) {
      alignas(64) float wide[kChunk];
      with_type<float>(p.weight, p.weight_dtype, label * p.weight_stride + h, [&](auto* w) { widen<float>(w, wide, count); });
      for (int64_t i = 0; i < count; ++i) b[i] = wide[i];
    } else {
      with_type<Real>(p.weight, p.weight_dtype, label * p.weight_stride + h, [&](auto* w) { widen<Real>(w, b, count); });
    }
    for (int64_t i = count; i < round_up(count, lanes); ++i) a[i] = b[i] = 0;
    Vec<Real> sum{};
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<Real> w = load_bits<Vec<Real>>(b + i);
      if (p.weight_dtype != p.x_dtype) w = rounded(w, rounding_to(p.x_dtype));
      sum += load_bits<Vec<Real>>(a + i) * w;
    }
    total += sum_lanes<Real>(sum);
  }
  if (p.bias) total += static_cast<const Real*>(p.bias)[label];
  Vec<Real> result = splat(Real(total));
  if (p.rounded) result = rounded(result, rounding_to(p.x_dtype));
  static_cast<Real*>(p.out)[t] = result[0];
}

inline void indexed_dot(const IndexedDot& p, ParallelFor run) {
  parallel(run, p.tokens, [&](int64_t t) {
    if (p.x_dtype == DType::kFloat64) {
      indexed_dot_row<double>(p, t);
    } else {
      indexed_dot_row<float>(p, t);
    }
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
