// The six operators as plain structs and launch functions: what bindings fill in and call. Meaning: kernels/operators/native.py.
//
// Pointers are device memory. Strides count elements. Nothing here allocates, synchronises or looks at data.
#pragma once

#include "../macros.h"
#include "../pair_loss.h"
#include "platform.cuh"

namespace logitless::cuda {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };

LOGITLESS_HOST_DEVICE constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

struct IndexedDot {
  const void* x;  // (n, hidden)
  int64_t x_stride;
  DType x_dtype;
  const void* weight;  // (vocab, hidden)
  int64_t weight_stride;
  DType weight_dtype;
  const void* bias;  // (vocab,) or null
  DType bias_dtype;
  const int64_t* labels;  // (n,)
  void* out;              // (n,) Accumulate of x
  int64_t n, hidden, vocab;
  bool match;
};

// Bits of TilePass::outputs. kWithoutSlope leaves a soft-cap's slope out of the destination: exp(z - k) alone.
enum TileOutputs : int { kEntropy = 1, kLogitSum = 2, kTopOne = 4, kSquares = 8, kWithoutSlope = 16 };
// Rows of TilePass::sums, as SUMS in kernels/operators/native.py.
enum TileSums : int { kSumE, kSumEz, kSumEe, kSumZ, kTarget, kBefore, kAfter, kTileSums };

struct TilePass {
  const void* source;  // (n, width)
  int64_t source_stride;
  DType source_dtype;
  void* destination;  // (n, width) or null
  int64_t destination_stride;
  DType destination_dtype;
  // Rows of the destination start where rows of the wider source start: a block reads a chunk before anyone writes it.
  bool overlapping;
  const void* bias;  // (width,) or null: the entries of these columns
  DType bias_dtype;
  const int64_t* labels;  // (n,)
  void* k;                // (n,) Accumulate of source
  double* sums;           // (7, n) or null
  int64_t sums_stride;
  const void* mix;  // (2, n) Accumulate of source, or null
  int64_t mix_stride;
  const void* at_target;  // (n,) Accumulate of source, or null
  double logit_scale, softcap, temperature;
  int64_t first;
  int64_t n, width;
  int outputs;
  int rounding;  // 0 not, 1 to bfloat16, 2 to float16
};

struct PairLossPass {
  const void* logps;  // (N,)
  DType logps_dtype;
  const void* weights;  // (N,) or null
  DType weights_dtype;
  const int64_t* offsets;   // (2 * pairs + 1,)
  const double* ref_logps;  // (2 * pairs,) or null
  PairLossOptions loss;
  bool mean;
  double scale;
  double* losses;          // (pairs,)
  double* sequence_logps;  // (2 * pairs,)
  void* coefficients;      // (N,) of the type of logps, or null
  int64_t pairs;
};

struct ScaleScatter {
  const void* values;  // (n, width)
  int64_t values_stride;
  DType values_dtype;
  const int64_t* rows;    // (n,)
  const void* factor;     // (1,) or (n,), of the type of values
  int64_t factor_stride;  // 0 or 1
  void* out;              // (out_rows, width)
  int64_t out_stride;
  DType out_dtype;
  int64_t n, width, out_rows;
};

struct ScaledConvert {
  const void* source;  // (count,)
  DType source_dtype;
  const void* factor;  // (1,) Accumulate of source
  void* out;           // (count,)
  DType out_dtype;
  int64_t count;
};

struct FinishTile {
  void* tile;  // (n, columns)
  int64_t tile_stride;
  DType tile_dtype;
  const void* factors;  // (blocks, n) Accumulate of tile, or null
  int64_t factors_stride;
  const int64_t* labels;  // (n,)
  const void* at_target;  // (n,) Accumulate of tile, or null
  int64_t n, columns, width, blocks;
};

void launch(const IndexedDot& op, cudaStream_t stream);
void launch(const TilePass& op, cudaStream_t stream);
void launch(const PairLossPass& op, cudaStream_t stream);
void launch(const ScaleScatter& op, cudaStream_t stream);
void launch(const ScaledConvert& op, cudaStream_t stream);
void launch(const FinishTile& op, cudaStream_t stream);

}  // namespace logitless::cuda
