// Arguments of the operators that run on CPUs and on GPUs. Bindings fill these structs from tensors; kernels read them. What
// each operator computes: kernels/operators/schemas.py.
//
// Conventions: pointers are memory of the device. Shapes are in the comment beside a pointer; "acc" is accumulate_type of the
// operand named there. A stride is the distance between rows in elements; elements of a row, and everything without a stride,
// are contiguous. Labels and row indices were checked by the caller; sizes that only bound them are used on GPUs, where
// that check does not wait for the device.
#pragma once

#include <cstdint>

#include "logitless/dtype.h"
#include "logitless/pair_loss.h"

namespace logitless {

// Raw logit r to logit z: r * logit_scale, then softcap * tanh(. / softcap) unless softcap is 0, then / temperature.
struct HeadSpec {
  double logit_scale, softcap, temperature;
};

// What raw logits are rounded to, bias included, before anything else.
enum class Rounding : int { kNone = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of `sums`, as SUMS in kernels/operators/schemas.py.
enum SumRow : int { kSumE, kSumEz, kSumEe, kSumZ, kSumTarget, kSumBefore, kSumAfter, kNumSums };

// Bits of `outputs`: rows of `sums` that are wanted besides e. kWithoutSlope leaves a soft-cap's slope out of the destination,
// which then holds exp(z - k) alone.
enum OutputBits : int { kWantEz = 1, kWantZ = 2, kWantTop = 4, kWantEe = 8, kWithoutSlope = 16, kAllOutputBits = 31 };

// A logit further than this (nats) above the offset k raises k to the row's maximum. The square of exp(30), which the sum of
// squares holds, times a vocabulary of 2^18 is far below float32's largest number.
constexpr double kRaiseAbove = 30.0;
// exp(kRaiseAbove): for kernels that have the sum of a few exponentials at hand, but not their largest logit.
constexpr double kRaiseSum = 1.0686474581524463e13;

// Lower bound of z - k where it multiplies exp(z - k), which is 0 there: keeps -inf * 0 out of sums.
constexpr double kFloor = -1000.0;

struct IndexedDot {
  const void* x;  // (tokens, hidden)
  int64_t x_stride;
  DType x_dtype;
  const void* weight;  // (vocab, hidden)
  int64_t weight_stride;
  DType weight_dtype;
  const void* bias;  // (vocab,) or null
  DType bias_dtype;
  const int64_t* labels;  // (tokens,)
  void* out;              // (tokens,) acc of x
  int64_t tokens, hidden, vocab;
  bool rounded;  // round the result to x_dtype
};

// Element-wise pass over a block of raw logits: the vocabulary entries first .. first + width.
struct TilePass {
  const void* source;  // (tokens, width)
  int64_t source_stride;
  DType source_dtype;
  void* destination;  // (tokens, width) or null; may be the memory of source
  int64_t destination_stride;
  DType destination_dtype;
  // Rows of the destination start where rows of the wider source start, so writes land on source elements that come later in
  // the row. Threads that share a row must have read a chunk before one of them writes it.
  bool overlapping;
  const void* bias;  // (width,) or null: the entries of these columns
  DType bias_dtype;
  const int64_t* labels;  // (tokens,) over the whole vocabulary
  void* k;                // (tokens,) acc of source; raised where a logit is far above it, unless sums is null
  double* sums;           // (kNumSums, tokens) or null
  int64_t sums_stride;
  const void* mix;  // (2, tokens) acc of source, or null
  int64_t mix_stride;
  const void* at_target;            // (tokens,) acc of source, or null: 0
  const void* inverse_temperature;  // (tokens,) acc of source: what z is multiplied by; or null: 1
  HeadSpec head;
  int64_t first;
  int64_t tokens, width;
  int outputs;  // OutputBits
  Rounding rounding;
};

// Sequence j has the tokens offsets[j] .. offsets[j + 1]; even sequences are chosen, odd ones rejected.
struct PairLoss {
  const void* logps;  // (tokens,) float32 or float64
  DType logps_dtype;
  const void* weights;  // (tokens,) or null
  DType weights_dtype;
  const int64_t* offsets;   // (2 * pairs + 1,)
  const double* ref_logps;  // (2 * pairs,) or null
  PairLossOptions loss;
  bool mean;  // divide each sequence's sum by its length
  double scale;
  double* losses;          // (pairs,)
  double* sequence_logps;  // (2 * pairs,)
  void* coefficients;      // (tokens,) of logps_dtype, or null
  int64_t pairs;
};

// out[rows[i]] = values[i] * factor
struct ScaleScatter {
  const void* values;  // (tokens, hidden) float32 or float64
  int64_t values_stride;
  DType values_dtype;
  const int64_t* rows;    // (tokens,) distinct
  const void* factor;     // (1,) or (tokens,) of values_dtype
  int64_t factor_stride;  // 0 or 1
  void* out;              // (out_rows, hidden)
  int64_t out_stride;
  DType out_dtype;
  int64_t tokens, hidden, out_rows;
};

// out = source * factor
struct ScaledConvert {
  const void* source;  // (count,)
  DType source_dtype;
  const void* factor;  // (1,) acc of source
  void* out;           // (count,)
  DType out_dtype;
  int64_t count;
};

// tile[t, columns of block j] *= factors[j, t], untouched where that is 1; then tile[t, labels[t]] = at_target[t]
struct FinishTile {
  void* tile;  // (tokens, columns)
  int64_t tile_stride;
  DType tile_dtype;
  const void* factors;  // (blocks, tokens) acc of tile, or null
  int64_t factors_stride;
  const int64_t* labels;                   // (tokens,)
  const void* at_target;                   // (tokens,) acc of tile, or null
  int64_t tokens, columns, width, blocks;  // a block has `width` columns, the last one what is left
};

}  // namespace logitless
