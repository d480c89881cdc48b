// Rows scaled and scattered, and whole tensors scaled and converted.
#pragma once

#include <cstdint>
#include <type_traits>

#include "logitless/cpu/isa.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

template <class Real>
LOGITLESS_INLINE void scaled_copy(const Real* from, Real factor, int64_t count, void* out, DType type, int64_t offset) {
  constexpr int lanes = Lanes<Real>::count;
  with_type<Real>(out, type, offset, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) Memory<Real, T>::store(to + i, load_bits<Vec<Real>>(from + i) * factor);
    if (i < count) store_some<Real>(to + i, load_some<Real>(from + i, int(count - i)) * factor, int(count - i));
  });
}

template <class Real>
void scale_scatter_rows(const ScaleScatter& p, ParallelFor run) {
  parallel(run, p.tokens, [&](int64_t i) {
    const Real factor = static_cast<const Real*>(p.factor)[i * p.factor_stride];
    const Real* values = static_cast<const Real*>(p.values) + i * p.values_stride;
    scaled_copy(values, factor, p.hidden, p.out, p.out_dtype, p.rows[i] * p.out_stride);
  });
}

inline void scale_scatter(const ScaleScatter& p, ParallelFor run) {
  p.values_dtype == DType::kFloat64 ? scale_scatter_rows<double>(p, run) : scale_scatter_rows<float>(p, run);
}

template <class Real>
void scaled_convert_all(const ScaledConvert& p, ParallelFor run) {
  constexpr int64_t step = 1 << 16;
  const Real factor = *static_cast<const Real*>(p.factor);
  parallel(run, (p.count + step - 1) / step, [&](int64_t i) {
    const int64_t offset = i * step;
    scaled_copy(static_cast<const Real*>(p.source) + offset, factor, least(step, p.count - offset), p.out, p.out_dtype, offset);
  });
}

inline void scaled_convert(const ScaledConvert& p, ParallelFor run) {
  p.source_dtype == DType::kFloat64 ? scaled_convert_all<double>(p, run) : scaled_convert_all<float>(p, run);
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
