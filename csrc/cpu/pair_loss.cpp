// Sequence log-probabilities, the pair loss and the coefficient of every token: one task per pair.
#include "logitless/pair_loss.h"

#include <cstdint>

#include "logitless/cpu/kernels.h"
#include "logitless/cpu/platform.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cpu {
namespace {

template <class Real>
void one_pair(const PairLoss& p, int64_t pair) {
  const Real* logps = static_cast<const Real*>(p.logps);
  const double* weights = static_cast<const double*>(p.weights);
  double value[2], delta = 0;
  for (int side = 0; side < 2; ++side) {
    const int64_t sequence = 2 * pair + side, begin = p.offsets[sequence], end = p.offsets[sequence + 1];
    double sum = 0;
    for (int64_t t = begin; t < end; ++t) {
      const double weight = weights ? weights[t] : 1;
      if (weight != 0) sum += weight * static_cast<double>(logps[t]);  // NaN * 0 is not 0
    }
    value[side] = p.mean && end > begin ? sum / static_cast<double>(end - begin) : sum;
    p.sequence_logps[sequence] = value[side];
    const double relative = value[side] - (p.ref_logps ? p.ref_logps[sequence] : 0);
    delta += side == 0 ? relative : -relative;
  }
  const PairLossValue loss = pair_loss_value(p.loss, delta);
  p.losses[pair] = loss.loss;
  if (!p.coefficients) return;
  for (int side = 0; side < 2; ++side) {
    const int64_t begin = p.offsets[2 * pair + side], end = p.offsets[2 * pair + side + 1];
    double unit = (side == 0 ? loss.slope : -loss.slope) * p.scale;
    if (p.mean && end > begin) unit /= static_cast<double>(end - begin);
    for (int64_t t = begin; t < end; ++t) {
      const double weight = weights ? weights[t] : 1;
      static_cast<Real*>(p.coefficients)[t] = static_cast<Real>(weight != 0 ? unit * weight : 0);
    }
  }
}

}  // namespace

void pair_loss(const PairLoss& p, ParallelFor run) {
  parallel(run, p.pairs,
           [&](int64_t pair) { p.logps_dtype == DType::kFloat64 ? one_pair<double>(p, pair) : one_pair<float>(p, pair); });
}

}  // namespace logitless::cpu
