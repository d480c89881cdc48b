// The operators of kernels/operators/native.py on CPUs: checks, pointers, and a call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "gemm.h"
#include "logitless/cpu/types.h"
#include "pairs.h"

namespace logitless {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(bool ok, const char* name, const char* what) { STD_TORCH_CHECK(ok, name, " ", what); }

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::Float32;
    case ScalarType::Double: return DType::Float64;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Half: return DType::Float16;
    default: check(false, name, "must be float32, float64, bfloat16 or float16"); return DType::Float32;
  }
}

ScalarType acc_of(DType t) { return t == DType::Float64 ? ScalarType::Double : ScalarType::Float; }

// A contiguous tensor of a known dtype and number of elements.
void check_dense(const Tensor& t, const char* name, ScalarType dtype, int64_t numel) {
  check(t.scalar_type() == dtype, name, "has the wrong dtype");
  check(t.numel() == numel, name, "has the wrong number of elements");
  check(t.is_contiguous(), name, "must be contiguous");
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, "has the wrong shape");
  check(columns <= 1 || t.stride(1) == 1, name, "must have rows without gaps");
}

template <class T>
T* maybe(const OptionalTensor& t, const char* name, ScalarType dtype, int64_t numel) {
  if (!t.has_value()) return nullptr;
  check_dense(*t, name, dtype, numel);
  return static_cast<T*>(t->data_ptr());
}

Rounding rounding_of(int64_t value) {
  check(value >= 0 && value <= 2, "rounding", "must be 0, 1 or 2");
  return static_cast<Rounding>(value);
}

void tile_pass(Tensor source, OptionalTensor destination, OptionalTensor bias, Tensor labels, Tensor k, OptionalTensor sums,
               OptionalTensor mix, OptionalTensor at_target, double logit_scale, double softcap, double temperature,
               int64_t first, int64_t outputs, int64_t rounding) {
  TilePass p{};
  check(source.dim() == 2, "source", "must have two dimensions");
  p.rows = source.size(0);
  p.width = source.size(1);
  check_rows(source, "source", p.rows, p.width);
  p.source = source.data_ptr();
  p.source_stride = source.stride(0);
  p.source_type = dtype_of(source, "source");
  const ScalarType acc = acc_of(p.source_type);
  if (destination.has_value()) {
    check_rows(*destination, "destination", p.rows, p.width);
    p.destination = destination->data_ptr();
    p.destination_stride = destination->stride(0);
    p.destination_type = dtype_of(*destination, "destination");
    check((p.destination_type == DType::Float64) == (acc == ScalarType::Double), "destination",
          "must be float64 where source is");
  }
  if (bias.has_value()) {
    check(bias->numel() >= first + p.width, "bias", "has too few elements");
    p.bias = maybe<void>(bias, "bias", acc, bias->numel());
  }
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  check_dense(k, "k", acc, p.rows);
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.k = k.data_ptr();
  p.sums = maybe<double>(sums, "sums", ScalarType::Double, NumSums * p.rows);
  p.mix = maybe<void>(mix, "mix", acc, 2 * p.rows);
  p.at_target = maybe<void>(at_target, "at_target", acc, p.rows);
  p.first = first;
  p.outputs = static_cast<int>(outputs);
  p.rounding = rounding_of(rounding);
  p.head = {logit_scale, softcap, temperature};
  kernels().tile_pass(p, run_parallel);
}

PackRows pack_arguments(const Tensor& x, const Tensor& out) {
  check(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, "x", "must be bfloat16 with two dimensions");
  check_rows(x, "x", x.size(0), x.size(1));
  PackRows p{};
  p.x = static_cast<const uint16_t*>(x.data_ptr());
  p.x_stride = x.stride(0);
  p.rows = x.size(0);
  p.hidden = x.size(1);
  p.out = static_cast<uint16_t*>(out.data_ptr());
  return p;
}

void pack_tokens(Tensor x, Tensor out) {
  PackRows p = pack_arguments(x, out);
  check(p.hidden % 2 == 0, "x", "must have an even number of columns");
  check_dense(out, "out", ScalarType::BFloat16, packed_tokens_size(p.rows, p.hidden));
  kernels().pack_tokens(p, run_parallel);
}

void pack_rows(Tensor x, Tensor scale, Tensor out) {
  PackRows p = pack_arguments(x, out);
  check_dense(scale, "scale", ScalarType::Float, p.rows);
  check_dense(out, "out", ScalarType::BFloat16, packed_rows_size(p.rows, p.hidden));
  p.scale = static_cast<const float*>(scale.data_ptr());
  kernels().pack_rows(p, run_parallel);
}

void score_block(Tensor packed, Tensor weight, OptionalTensor bias, Tensor labels, OptionalTensor start, Tensor k,
                 OptionalTensor sums, OptionalTensor mix, OptionalTensor gradient, double logit_scale, double softcap,
                 double temperature, int64_t first, int64_t outputs, int64_t rounding) {
  ScoreBlock p{};
  check(weight.dim() == 2, "weight", "must have two dimensions");
  p.rows = labels.numel();
  p.width = weight.size(0);
  p.hidden = weight.size(1);
  check(p.hidden % 2 == 0, "weight", "must have an even number of columns");
  check_rows(weight, "weight", p.width, p.hidden);
  check_dense(packed, "packed", ScalarType::BFloat16, packed_tokens_size(p.rows, p.hidden));
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  check_dense(k, "k", ScalarType::Float, p.rows);
  p.tokens = static_cast<const uint16_t*>(packed.data_ptr());
  p.weight = weight.data_ptr();
  p.weight_stride = weight.stride(0);
  p.weight_type = dtype_of(weight, "weight");
  check(p.weight_type != DType::Float64, "weight", "must not be float64");
  if (bias.has_value()) {
    check(bias->numel() >= first + p.width, "bias", "has too few elements");
    p.bias = maybe<float>(bias, "bias", ScalarType::Float, bias->numel());
  }
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.k = static_cast<float*>(k.data_ptr());
  p.start = maybe<const float>(start, "start", ScalarType::Float, p.rows);
  p.sums = maybe<double>(sums, "sums", ScalarType::Double, NumSums * p.rows);
  check(p.start || !p.sums, "start", "is needed for sums");
  p.mix = maybe<float>(mix, "mix", ScalarType::Float, 2 * p.rows);
  p.gradient = maybe<uint16_t>(gradient, "gradient", ScalarType::BFloat16, p.width * p.rows);
  p.first = first;
  p.outputs = static_cast<int>(outputs);
  p.rounding = rounding_of(rounding);
  p.head = {logit_scale, softcap, temperature};
  kernels().score_block(p, run_parallel, small_gemm, release_gemm);
}

void grad_hidden(Tensor gradient, Tensor weight, Tensor dhidden) {
  GradHidden p{};
  check(weight.dim() == 2, "weight", "must have two dimensions");
  check(dhidden.dim() == 2, "dhidden", "must have two dimensions");
  p.width = weight.size(0);
  p.hidden = weight.size(1);
  p.rows = dhidden.size(0);
  check_rows(weight, "weight", p.width, p.hidden);
  check_dense(gradient, "gradient", ScalarType::BFloat16, p.width * p.rows);
  check_dense(dhidden, "dhidden", ScalarType::Float, p.rows * p.hidden);
  p.gradient = static_cast<const uint16_t*>(gradient.data_ptr());
  p.weight = weight.data_ptr();
  p.weight_stride = weight.stride(0);
  p.weight_type = dtype_of(weight, "weight");
  check(p.weight_type != DType::Float64, "weight", "must not be float64");
  p.dhidden = static_cast<float*>(dhidden.data_ptr());
  p.threads = num_threads();
  kernels().grad_hidden(p, run_parallel, small_gemm, release_gemm);
}

void grad_weight(Tensor gradient, OptionalTensor packed, Tensor x, Tensor scale, Tensor values, Tensor labels, int64_t first,
                 int64_t width, bool accumulate, OptionalTensor dweight, OptionalTensor dbias) {
  GradWeight p{};
  check(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, "x", "must be bfloat16 with two dimensions");
  p.rows = x.size(0);
  p.hidden = x.size(1);
  p.width = width;
  p.first = first;
  check_rows(x, "x", p.rows, p.hidden);
  check_dense(gradient, "gradient", ScalarType::BFloat16, p.width * p.rows);
  check_dense(scale, "scale", ScalarType::Float, p.rows);
  check_dense(values, "values", ScalarType::Float, p.rows);
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  check(packed.has_value() || !dweight.has_value(), "packed", "is needed for dweight");
  p.packed = maybe<const uint16_t>(packed, "packed", ScalarType::BFloat16, packed_rows_size(p.rows, p.hidden));
  p.gradient = static_cast<const uint16_t*>(gradient.data_ptr());
  p.x = static_cast<const uint16_t*>(x.data_ptr());
  p.x_stride = x.stride(0);
  p.scale = static_cast<const float*>(scale.data_ptr());
  p.values = static_cast<const float*>(values.data_ptr());
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.accumulate = accumulate;
  if (dweight.has_value()) {
    p.dweight_type = dtype_of(*dweight, "dweight");
    check(p.dweight_type == DType::Float32 || (p.dweight_type != DType::Float64 && !accumulate), "dweight",
          "must be float32, or without accumulate a 16-bit type");
    p.dweight = maybe<void>(dweight, "dweight", dweight->scalar_type(), width * p.hidden);
  }
  p.dbias = maybe<float>(dbias, "dbias", ScalarType::Float, width);
  kernels().grad_weight(p, run_parallel, small_gemm, release_gemm);
}

void indexed_dot(Tensor x, Tensor weight, OptionalTensor bias, Tensor labels, bool match, Tensor out) {
  IndexedDot p{};
  check(x.dim() == 2, "x", "must have two dimensions");
  p.rows = x.size(0);
  p.hidden = x.size(1);
  check_rows(x, "x", p.rows, p.hidden);
  check(weight.dim() == 2, "weight", "must have two dimensions");
  check_rows(weight, "weight", weight.size(0), p.hidden);
  p.x = x.data_ptr();
  p.x_stride = x.stride(0);
  p.x_type = dtype_of(x, "x");
  p.weight = weight.data_ptr();
  p.weight_stride = weight.stride(0);
  p.weight_type = dtype_of(weight, "weight");
  const ScalarType acc = acc_of(p.x_type);
  p.bias = maybe<void>(bias, "bias", acc, weight.size(0));
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  check_dense(out, "out", acc, p.rows);
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.out = out.data_ptr();
  p.match = match;
  kernels().indexed_dot(p, run_parallel);
}

void finish_rows(Tensor values, Tensor scale, Tensor target, Tensor weight, Tensor labels) {
  FinishRows p{};
  check(values.dim() == 2, "values", "must have two dimensions");
  p.rows = values.size(0);
  p.hidden = values.size(1);
  check_dense(values, "values", ScalarType::Float, p.rows * p.hidden);
  check_dense(scale, "scale", ScalarType::Float, p.rows);
  check_dense(target, "target", ScalarType::Float, p.rows);
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  check(weight.dim() == 2, "weight", "must have two dimensions");
  check_rows(weight, "weight", weight.size(0), p.hidden);
  p.values = static_cast<float*>(values.data_ptr());
  p.scale = static_cast<const float*>(scale.data_ptr());
  p.target = static_cast<const float*>(target.data_ptr());
  p.weight = weight.data_ptr();
  p.weight_stride = weight.stride(0);
  p.weight_type = dtype_of(weight, "weight");
  check(p.weight_type != DType::Float64, "weight", "must not be float64");
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  kernels().finish_rows(p, run_parallel);
}

void scale_scatter(Tensor values, Tensor rows, Tensor factor, Tensor out) {
  ScaleScatter p{};
  check(values.dim() == 2 && out.dim() == 2 && values.size(1) == out.size(1), "out", "must have rows like those of values");
  p.count = values.size(0);
  p.hidden = values.size(1);
  p.wide = values.scalar_type() == ScalarType::Double;
  const ScalarType acc = p.wide ? ScalarType::Double : ScalarType::Float;
  check_dense(values, "values", acc, p.count * p.hidden);
  check_dense(rows, "rows", ScalarType::Long, p.count);
  check(factor.numel() == 1 || factor.numel() == p.count, "factor", "must have one element, or one for each row");
  check_dense(factor, "factor", acc, factor.numel());
  p.out_type = dtype_of(out, "out");
  check_dense(out, "out", out.scalar_type(), out.numel());
  check((p.out_type == DType::Float64) == p.wide, "out", "must be float64 where values are");
  p.values = values.data_ptr();
  p.rows = static_cast<const int64_t*>(rows.data_ptr());
  p.factor = factor.data_ptr();
  p.factor_per_row = factor.numel() != 1;
  p.out = out.data_ptr();
  kernels().scale_scatter(p, run_parallel);
}

void scaled_convert(Tensor source, Tensor factor, Tensor out) {
  ScaledConvert p{};
  p.count = source.numel();
  p.wide = source.scalar_type() == ScalarType::Double;
  const ScalarType acc = p.wide ? ScalarType::Double : ScalarType::Float;
  check_dense(source, "source", acc, p.count);
  check_dense(factor, "factor", acc, 1);
  p.out_type = dtype_of(out, "out");
  check_dense(out, "out", out.scalar_type(), p.count);
  check((p.out_type == DType::Float64) == p.wide, "out", "must be float64 where source is");
  p.source = source.data_ptr();
  p.factor = factor.data_ptr();
  p.out = out.data_ptr();
  kernels().scaled_convert(p, run_parallel);
}

void finish_tile(Tensor tile, OptionalTensor factors, Tensor labels, OptionalTensor at_target, int64_t width) {
  FinishTile p{};
  check(tile.dim() == 2, "tile", "must have two dimensions");
  p.rows = tile.size(0);
  p.columns = tile.size(1);
  check_rows(tile, "tile", p.rows, p.columns);
  check(p.rows <= 1 || tile.stride(0) >= p.columns, "tile", "must have rows that do not overlap");
  check(width > 0, "width", "must be > 0");
  p.tile = tile.data_ptr();
  p.tile_stride = tile.stride(0);
  p.tile_type = dtype_of(tile, "tile");
  const ScalarType acc = acc_of(p.tile_type);
  const int64_t blocks = p.columns / width + (p.columns % width != 0);
  if (factors.has_value())
    check(factors->dim() == 2 && factors->size(0) == blocks, "factors", "must have a row for each block");
  p.factors = maybe<void>(factors, "factors", acc, blocks * p.rows);
  check_dense(labels, "labels", ScalarType::Long, p.rows);
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.at_target = maybe<void>(at_target, "at_target", acc, p.rows);
  p.width = width;
  if (p.columns == 0) return;
  kernels().finish_tile(p, run_parallel);
}

void pair_loss_op(Tensor logps, OptionalTensor weights, Tensor offsets, OptionalTensor ref_logps, int64_t kind, bool mean,
                  double beta, double gamma, double label_smoothing, double scale, Tensor losses, Tensor sequence_logps,
                  OptionalTensor coefficients) {
  PairLossPass p{};
  p.pairs = losses.numel();
  p.wide = logps.scalar_type() == ScalarType::Double;
  const ScalarType acc = p.wide ? ScalarType::Double : ScalarType::Float;
  check_dense(logps, "logps", acc, logps.numel());
  check_dense(offsets, "offsets", ScalarType::Long, 2 * p.pairs + 1);
  check_dense(losses, "losses", ScalarType::Double, p.pairs);
  check_dense(sequence_logps, "sequence_logps", ScalarType::Double, 2 * p.pairs);
  check(kind >= 0 && kind < kPairLossKinds, "kind", "must be 0, 1 or 2");
  p.logps = logps.data_ptr();
  p.weights = maybe<const double>(weights, "weights", ScalarType::Double, logps.numel());
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  check(p.offsets[0] >= 0 && p.offsets[2 * p.pairs] <= logps.numel(), "offsets", "must lie within logps");
  p.ref_logps = maybe<const double>(ref_logps, "ref_logps", ScalarType::Double, 2 * p.pairs);
  p.options = {static_cast<int>(kind), beta, gamma, label_smoothing};
  p.mean = mean;
  p.scale = scale;
  p.losses = static_cast<double*>(losses.data_ptr());
  p.sequence_logps = static_cast<double*>(sequence_logps.data_ptr());
  p.coefficients = maybe<void>(coefficients, "coefficients", acc, logps.numel());
  pair_loss(p, run_parallel);
}

}  // namespace
}  // namespace logitless

STABLE_TORCH_LIBRARY_IMPL(logitless, CPU, m) {
  m.impl("tile_pass", TORCH_BOX(&logitless::tile_pass));
  m.impl("pack_tokens", TORCH_BOX(&logitless::pack_tokens));
  m.impl("pack_rows", TORCH_BOX(&logitless::pack_rows));
  m.impl("score_block", TORCH_BOX(&logitless::score_block));
  m.impl("grad_hidden", TORCH_BOX(&logitless::grad_hidden));
  m.impl("grad_weight", TORCH_BOX(&logitless::grad_weight));
  m.impl("pair_loss", TORCH_BOX(&logitless::pair_loss_op));
  m.impl("indexed_dot", TORCH_BOX(&logitless::indexed_dot));
  m.impl("finish_rows", TORCH_BOX(&logitless::finish_rows));
  m.impl("scale_scatter", TORCH_BOX(&logitless::scale_scatter));
  m.impl("scaled_convert", TORCH_BOX(&logitless::scaled_convert));
  m.impl("finish_tile", TORCH_BOX(&logitless::finish_tile));
}

// For the loader (kernels/operators/native.py), which asks before any operator runs.
extern "C" {
__attribute__((visibility("default"))) const char* logitless_schemas() { return LOGITLESS_SCHEMAS; }
__attribute__((visibility("default"))) const char* logitless_cpu_isa() { return logitless::kernels().name; }
__attribute__((visibility("default"))) int logitless_cpu_has_bf16_gemm() { return logitless::has_small_gemm(); }
}
