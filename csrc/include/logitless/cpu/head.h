// From raw logits to the logits of the softmax: scale, soft-cap, temperature. See HeadSpec.
#pragma once

#include "logitless/cpu/isa.h"
#include "logitless/cpu/vec.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

template <class Real>
struct Head {
  Real inner;  // before the tanh; the whole slope without one
  Real outer;  // after it
  bool capped;

  explicit Head(const HeadSpec& spec)
      : inner(Real(spec.softcap > 0 ? spec.logit_scale / spec.softcap : spec.logit_scale / spec.temperature)),
        outer(Real(spec.softcap > 0 ? spec.softcap / spec.temperature : 1)),
        capped(spec.softcap > 0) {}

  // Of a token with a temperature of its own.
  Head(const HeadSpec& spec, Real inverse_temperature) : Head(spec) { (capped ? outer : inner) *= inverse_temperature; }

  // slope: 1 - tanh^2, left alone without a soft-cap
  LOGITLESS_INLINE Vec<Real> operator()(Vec<Real> r, Vec<Real>& slope) const {
    if (!capped) return r * inner;
    return tanh<Real>(r * inner, slope) * outer;
  }
};

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
