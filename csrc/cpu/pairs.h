#pragma once

#include "logitless/cpu/types.h"
#include "logitless/pair_loss.h"

namespace logitless {

struct PairLossPass {
  const void* logps;  // (N) float, or double if wide
  bool wide;
  const double* weights;    // (N), or null
  const int64_t* offsets;   // (2 * pairs + 1)
  const double* ref_logps;  // (2 * pairs), or null
  PairLossOptions options;
  bool mean;
  double scale;
  double* losses;          // (pairs)
  double* sequence_logps;  // (2 * pairs)
  void* coefficients;      // (N) like logps, or null
  int64_t pairs;
};

void pair_loss(const PairLossPass& p, ParallelFor run);

}  // namespace logitless
