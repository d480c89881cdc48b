// Losses of one margin per pair, with their derivative, for every device. See kernels/operators/schemas.py, pair_loss.
#pragma once

#include <cmath>

#include "macros.h"

namespace logitless {

// As MARGIN_FUNCTIONS in kernels/operators/schemas.py.
enum MarginFunction : int { kLogSigmoid, kHinge, kSquare, kMarginFunctions };

struct PairLossOptions {
  int kind;  // MarginFunction
  double beta;
  double gamma;
  double label_smoothing;
};

struct PairLossValue {
  double loss;
  double slope;  // dloss / ddelta
};

// log(1 + exp(x)), without overflow and without cancellation.
LOGITLESS_HOST_DEVICE inline double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(x > 0 ? -x : x)); }

// 1 / (1 + exp(-x)), with full relative precision at both ends.
LOGITLESS_HOST_DEVICE inline double sigmoid(double x) {
  const double e = exp(x > 0 ? -x : x);
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

// delta: chosen minus rejected log-probability, relative to the reference where there is one.
LOGITLESS_HOST_DEVICE inline PairLossValue pair_loss_value(const PairLossOptions& options, double delta) {
  if (options.kind == kHinge) {
    const double gap = 1 - options.beta * delta;
    // a NaN fails both comparisons and stays
    return {gap <= 0 ? 0.0 : gap, gap <= 0 ? 0.0 : -options.beta};
  }
  if (options.kind == kSquare) {
    const double gap = delta - 1 / (2 * options.beta);
    return {gap * gap, 2 * gap};
  }
  const double h = options.beta * delta - options.gamma;
  const double keep = 1 - options.label_smoothing;
  PairLossValue value{keep * softplus(-h), -keep * sigmoid(-h)};
  if (options.label_smoothing != 0) {  // 0 * softplus(inf) is not 0
    value.loss += options.label_smoothing * softplus(h);
    value.slope += options.label_smoothing * sigmoid(h);
  }
  value.slope *= options.beta;
  return value;
}

}  // namespace logitless
