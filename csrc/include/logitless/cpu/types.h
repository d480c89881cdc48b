// What the CPU kernels and their callers share. No framework: parallel loops and the small GEMM come in as functions.
#pragma once

#include <cstdint>

namespace logitless {

enum class DType : int { Float32, Float64, BFloat16, Float16 };

inline int64_t size_of(DType t) { return t == DType::Float64 ? 8 : t == DType::Float32 ? 4 : 2; }

// z = T(r): r * scale, or cap * tanh(r * scale / cap), over the temperature; cap 0 is none.
struct Head {
  double scale, cap, temperature;
};

enum Rounding : int { KeepFloat = 0, RoundToBFloat16 = 1, RoundToFloat16 = 2 };

// Rows of the sums, and the bits that ask for them (e is always there).
enum Sum : int { SumE, SumEZ, SumEE, SumZ, SumTarget, SumBefore, SumAfter, NumSums };
// WithoutSlope leaves a soft-cap's slope out of the gradient: exp(z - k) alone.
enum Output : int { WantEZ = 1, WantZ = 2, WantTop = 4, WantEE = 8, WithoutSlope = 16 };

// A logit this far (nats) above the offset k raises k to the row's maximum. exp(30)^2 * V stays finite in float32.
constexpr double kRaiseAbove = 30.0;
constexpr double kRaiseSum = 1.0686474581524463e13;  // exp(kRaiseAbove)
// exp underflows to 0 below this; keeps -inf * 0 out of the entropy.
constexpr double kFloor = -1000.0;

// fn(i, context) for i in 0..count, each once, in any order and thread.
using Task = void (*)(int64_t, void*);
using ParallelFor = void (*)(int64_t count, Task fn, void* context);

template <class F>
void parallel(ParallelFor run, int64_t count, F&& body) {
  run(count, [](int64_t i, void* context) { (*static_cast<F*>(context))(i); }, &body);
}

// C (m, n) float32 = or += A (m, k) bf16 * B, with k even and B in pairs of rows: (k / 2, ldb, 2).
using SmallGemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                           const uint16_t* b, float* c);

// Runs before the kernels leave a thread: the GEMM may hold on to a hardware context.
using ReleaseGemm = void (*)();

// Element-wise pass over raw logits whose rows are tokens. See kernels/operators/native.py, tile_pass.
struct TilePass {
  const void* source;
  int64_t source_stride;  // elements
  DType source_type;
  void* destination;  // or null
  int64_t destination_stride;
  DType destination_type;
  const void* bias;  // (V) like k, or null
  const int64_t* labels;
  void* k;                // float, or double for double logits; so are mix and at_target
  double* sums;           // (NumSums, rows), or null: k is final
  const void* mix;        // (2, rows), or null
  const void* at_target;  // (rows), or null
  int64_t rows, width, first;
  int outputs;
  Rounding rounding;
  Head head;
};

// A block of logits made by small GEMMs and used while it is in cache: rows are vocabulary entries, columns tokens.
struct ScoreBlock {
  const uint16_t* tokens;  // packed by pack_tokens
  const void* weight;      // rows of the block; rounded to bf16 if of another type
  int64_t weight_stride;
  DType weight_type;  // not Float64
  const float* bias;  // (V), or null
  const int64_t* labels;
  const float* start;  // (rows) the k that every span begins with
  float* k;            // (rows) the k of sums and gradient
  double* sums;        // (NumSums, rows), or null: k is final, start not read
  const float* mix;    // (2, rows), or null
  uint16_t* gradient;  // (width, rows) bf16, or null
  int64_t rows, hidden, width, first;
  int outputs;
  Rounding rounding;
  Head head;
};

// dhidden (rows, hidden) += gradient^T (rows, width) * weight (width, hidden)
struct GradHidden {
  const uint16_t* gradient;
  const void* weight;
  int64_t weight_stride;
  DType weight_type;
  float* dhidden;
  int64_t rows, hidden, width;
  int64_t threads;
};

// dweight (width, hidden) = or += gradient (width, rows) * packed + the labels' share; dbias (width) += gradient * scale.
struct GradWeight {
  const uint16_t* gradient;
  const uint16_t* packed;  // scale * x by pack_rows
  const uint16_t* x;       // (rows, hidden) bf16
  int64_t x_stride;
  const float* scale;     // (rows)
  const float* values;    // (rows) the label's gradient, added in float32
  const int64_t* labels;  // (rows)
  void* dweight;          // or null
  DType dweight_type;     // not Float64
  bool accumulate;        // add to dweight (Float32); otherwise it is written
  float* dbias;           // (width), or null; added to
  int64_t rows, hidden, width, first;
};

struct PackRows {
  const uint16_t* x;
  int64_t x_stride;
  const float* scale;  // (rows), or null
  uint16_t* out;
  int64_t rows, hidden;
};

// out[t] = x[t] . weight[labels[t]] + bias[labels[t]]
struct IndexedDot {
  const void* x;
  int64_t x_stride;
  DType x_type;
  const void* weight;
  int64_t weight_stride;
  DType weight_type;
  const void* bias;  // (V) like out, or null
  const int64_t* labels;
  void* out;  // float, or double for double x
  int64_t rows, hidden;
  bool match;  // round the result to x's type
};

// values[t] = values[t] * scale[t] + target[t] * weight[labels[t]]
struct FinishRows {
  float* values;
  const float* scale;
  const float* target;
  const void* weight;  // rounded to bf16 if of another type
  int64_t weight_stride;
  DType weight_type;
  const int64_t* labels;
  int64_t rows, hidden;
};

// out[rows[i]] = values[i] * factor
struct ScaleScatter {
  const void* values;
  bool wide;  // values and factor are double
  const int64_t* rows;
  const void* factor;
  bool factor_per_row;
  void* out;
  DType out_type;
  int64_t count, hidden;
};

// out = source * factor
struct ScaledConvert {
  const void* source;
  bool wide;
  const void* factor;
  void* out;
  DType out_type;
  int64_t count;
};

// tile[t, block j] *= factors[j, t], untouched where that is 1; then tile[t, labels[t]] = at_target[t]
struct FinishTile {
  void* tile;
  int64_t tile_stride;  // elements
  DType tile_type;
  const void* factors;  // (blocks of `width` columns, rows) float, or double for a double tile; or null
  const int64_t* labels;
  const void* at_target;  // (rows) like factors, or null
  int64_t rows, columns, width;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*tile_pass)(const TilePass&, ParallelFor);
  void (*pack_tokens)(const PackRows&, ParallelFor);
  void (*pack_rows)(const PackRows&, ParallelFor);
  void (*score_block)(const ScoreBlock&, ParallelFor, SmallGemm, ReleaseGemm);
  void (*grad_hidden)(const GradHidden&, ParallelFor, SmallGemm, ReleaseGemm);
  void (*grad_weight)(const GradWeight&, ParallelFor, SmallGemm, ReleaseGemm);
  void (*indexed_dot)(const IndexedDot&, ParallelFor);
  void (*finish_rows)(const FinishRows&, ParallelFor);
  void (*scale_scatter)(const ScaleScatter&, ParallelFor);
  void (*scaled_convert)(const ScaledConvert&, ParallelFor);
  void (*finish_tile)(const FinishTile&, ParallelFor);
};

// Those this machine runs fastest; LOGITLESS_CPU_ISA=avx512_bf16, avx512, avx2 or generic picks others that it has.
const Kernels& kernels();

// Elements of pack_tokens' (rows padded to 16) and pack_rows' (rows to 2, hidden to 64) outputs.
constexpr int64_t kTokenBlock = 64, kTokenPad = 16, kHiddenBlock = 64;
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t packed_tokens_size(int64_t rows, int64_t hidden) { return round_up(rows, kTokenPad) * hidden; }
inline int64_t packed_rows_size(int64_t rows, int64_t hidden) { return round_up(rows, 2) * round_up(hidden, kHiddenBlock); }

}  // namespace logitless
