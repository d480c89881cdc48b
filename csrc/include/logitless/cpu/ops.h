// Arguments of the operators that only CPUs have. Conventions as in logitless/ops.h; bfloat16 elements are plain uint16_t, as
// the small GEMM reads them.
#pragma once

#include <cstdint>

#include "logitless/cpu/platform.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cpu {

// Layout of packed operands: tokens in blocks of kTokenBlock, the last one padded to kTokenPad; hidden elements in blocks of
// kHiddenBlock.
constexpr int64_t kTokenBlock = 64, kTokenPad = 16, kHiddenBlock = 64;

// Vocabulary entries and hidden elements (the inner dimension) of one small GEMM.
constexpr int64_t kUnitRows = 64, kDepth = 1024;

// Elements of the outputs of pack_tokens and pack_rows.
inline int64_t packed_tokens_size(int64_t tokens, int64_t hidden) { return round_up(tokens, kTokenPad) * hidden; }
inline int64_t packed_rows_size(int64_t tokens, int64_t hidden) { return round_up(tokens, 2) * round_up(hidden, kHiddenBlock); }

// Arguments of pack_tokens (scale null) and pack_rows.
struct Pack {
  const uint16_t* x;  // (tokens, hidden) bfloat16
  int64_t x_stride;
  const float* scale;  // (tokens,) or null
  uint16_t* out;       // (packed_tokens_size,) or (packed_rows_size,) bfloat16
  int64_t tokens, hidden;
};

// Logits of the vocabulary entries first .. first + width by small GEMMs, and tile_pass on them while they are in the cache.
// Tiles are transposed: rows are vocabulary entries, columns are tokens.
struct ScoreBlock {
  const uint16_t* packed;  // (packed_tokens_size,) bfloat16, by pack_tokens
  const void* weight;      // (width, hidden), not float64; rounded to bfloat16 if of another type
  int64_t weight_stride;
  DType weight_dtype;
  const float* bias;      // (width,) or null: the entries of these rows
  const int64_t* labels;  // (tokens,) over the whole vocabulary
  const float* start;     // (tokens,) the k that every span begins with; read where sums is given
  float* k;               // (tokens,) the k of sums and gradient; raised where a logit is far above it, unless sums is null
  double* sums;           // (kNumSums, tokens) or null
  const float* mix;       // (2, tokens) or null
  const float* inverse_temperature;  // (tokens,) what z is multiplied by; or null: 1
  uint16_t* gradient;                // (width, tokens) bfloat16, or null
  HeadSpec head;
  int64_t first;
  int64_t tokens, hidden, width;
  int outputs;  // OutputBits
  Rounding rounding;
};

// dhidden += gradient^T * weight
struct GradHidden {
  const uint16_t* gradient;  // (width, tokens) bfloat16
  const void* weight;        // (width, hidden), not float64; rounded to bfloat16 if of another type
  int64_t weight_stride;
  DType weight_dtype;
  float* dhidden;  // (tokens, hidden)
  int64_t tokens, hidden, width;
  int64_t threads;  // how many the parallel loop has
};

// values[t] = values[t] * scale[t] + target[t] * weight[labels[t]]
struct FinishRows {
  float* values;        // (tokens, hidden)
  const float* scale;   // (tokens,)
  const float* target;  // (tokens,)
  const void* weight;   // (vocab, hidden), not float64; rounded to bfloat16 if of another type
  int64_t weight_stride;
  DType weight_dtype;
  const int64_t* labels;  // (tokens,)
  int64_t tokens, hidden;
};

// dweight = or += gradient * (scale * x), plus values[t] * x[t] at row labels[t] - first; dbias += gradient * scale, plus
// values.
struct GradWeight {
  const uint16_t* gradient;  // (width, tokens) bfloat16
  const uint16_t* packed;    // (packed_rows_size,) bfloat16: scale * x by pack_rows; null without dweight
  const uint16_t* x;         // (tokens, hidden) bfloat16
  int64_t x_stride;
  const float* scale;     // (tokens,)
  const float* values;    // (tokens,) the labels' entries, added in float32
  const int64_t* labels;  // (tokens,) over the whole vocabulary
  void* dweight;          // (width, hidden) float32, or a 16-bit type without accumulate; or null
  DType dweight_dtype;
  bool accumulate;  // add to dweight; otherwise it is written
  float* dbias;     // (width,) or null; added to
  int64_t first;
  int64_t tokens, hidden, width;
};

}  // namespace logitless::cpu
