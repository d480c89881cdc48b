// From raw logits to the logits of the softmax: bias, rounding, scale, soft-cap, temperature. See HeadSpec.
#pragma once

#include "dtype.cuh"
#include "math.cuh"

namespace logitless::cuda {

template <typename Acc>
struct Head {
  bool capped;
  int rounding;
  Acc inner;          // before the tanh; the whole slope without one
  Acc outer;          // after it
  Acc inverse_outer;  // from z back to the tanh

  Head(double logit_scale, double softcap, double temperature, int rounding_)
      : capped(softcap != 0),
        rounding(rounding_),
        inner(static_cast<Acc>(logit_scale / (capped ? softcap : temperature))),
        outer(static_cast<Acc>(softcap / temperature)),
        inverse_outer(capped ? static_cast<Acc>(temperature / softcap) : Acc{0}) {}

  // Raw logits, bias already added, to z. Options are the same for all threads: one branch for a vector, none for an element.
  template <int N>
  __device__ inline void transform(Acc (&z)[N]) const {
    if (rounding == 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = rounded_to<bfloat16>(z[i]);
    } else if (rounding == 2) {
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

  // 1 - tanh^2 of a capped logit. Found from z, which costs a rounding and saves a register for every logit in flight.
  __device__ inline Acc slope(Acc z) const {
    const Acc t = z * inverse_outer;
    return larger(fused_multiply_add(-t, t, Acc{1}), Acc{0});
  }
};

}  // namespace logitless::cuda
