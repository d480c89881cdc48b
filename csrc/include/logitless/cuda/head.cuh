// From raw logits to the logits of the softmax: bias, rounding, scale, soft-cap, temperature. See HeadSpec.
#pragma once

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/math.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

template <typename Acc>
struct Head {
  bool capped;
  Rounding rounding;
  Acc inner;          // before the tanh; the whole slope without one
  Acc outer;          // after it
  Acc inverse_outer;  // from z back to the tanh

  Head(const HeadSpec& spec, Rounding rounding_)
      : capped(spec.softcap != 0),
        rounding(rounding_),
        inner(static_cast<Acc>(spec.logit_scale / (capped ? spec.softcap : spec.temperature))),
        outer(static_cast<Acc>(spec.softcap / spec.temperature)),
        inverse_outer(capped ? static_cast<Acc>(spec.temperature / spec.softcap) : Acc{0}) {}

  // Raw logits, bias already added, to z. Options are the same for all threads: one branch per vector, none per element.
  template <int N>
  __device__ inline void transform(Acc (&z)[N]) const {
    if (rounding == Rounding::kBFloat16) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = rounded_to<bfloat16>(z[i]);
    } else if (rounding == Rounding::kFloat16) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = rounded_to<float16>(z[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = rounded_product(z[i], inner);
    if (capped) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = rounded_product(hyperbolic_tangent(z[i]), outer);
    }
  }

  // 1 - tanh^2 of a capped logit. Computed from z, which costs a rounding and saves a register per logit in flight.
  __device__ inline Acc slope(Acc z) const {
    const Acc t = z * inverse_outer;
    return larger(fused_multiply_add(-t, t, Acc{1}), Acc{0});
  }
};

}  // namespace logitless::cuda
