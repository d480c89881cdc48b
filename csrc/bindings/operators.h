// The operators that both devices have, from tensors to a kernel: check arguments, fill the struct of logitless/ops.h, run it.
// What they compute: kernels/operators/schemas.py, in the same order.
//
// A template argument Device has
//   Device(tensor).run(op)   runs the kernel of `op` on the tensor's device;
//   Device::kMixesTypes      whether kernels read a bias, tokens' weights and the source of scaled_convert in any type, rather
//   than
//                            in the type that they compute in, and whether they convert between float64 and narrower types;
//   Device::kHostMemory      whether values of tensors may be read here, without waiting for the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>

#include "checks.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"
#include "logitless/pair_loss.h"
#include "overlap.h"

namespace logitless::bindings {

constexpr int64_t kMaxColumns = INT32_MAX / 2;  // kernels count the columns of a tile in 32 bits

template <class Device>
void check_operand_type(const MaybeTensor& tensor, const char* name, ScalarType type) {
  if (!Device::kMixesTypes && tensor.has_value()) check_type(*tensor, name, type);
}

template <class Device>
void check_output_type(const Tensor& out, const char* name, const Tensor& input, const char* input_name) {
  STD_TORCH_CHECK(Device::kMixesTypes || accumulate_type(out) == accumulate_type(input), name,
                  " must be float64 if and only if ", input_name, " is, got ", name_of(out.scalar_type()), " for ",
                  name_of(input.scalar_type()));
}

template <class Device>
void indexed_dot(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels, bool rounded,
                 const Tensor& out) {
  check_rank(x, "x", 2);
  check_rank(weight, "weight", 2);
  IndexedDot op{};
  op.tokens = x.size(0);
  op.hidden = x.size(1);
  op.vocab = weight.size(0);
  check_tensor(x, "x", x, {op.tokens, op.hidden});
  check_tensor(weight, "weight", x, {op.vocab, op.hidden});
  check_tensor(bias, "bias", x, {op.vocab});
  check_operand_type<Device>(bias, "bias", accumulate_type(x));
  check_tensor(labels, "labels", x, {op.tokens}, ScalarType::Long);
  check_tensor(out, "out", x, {op.tokens}, accumulate_type(x));
  op.x = pointer(x);
  op.x_stride = x.stride(0);
  op.x_dtype = dtype_of(x, "x");
  op.weight = pointer(weight);
  op.weight_stride = weight.stride(0);
  op.weight_dtype = dtype_of(weight, "weight");
  op.bias = pointer(bias);
  if (bias.has_value()) op.bias_dtype = dtype_of(*bias, "bias");
  op.labels = pointer<int64_t>(labels);
  op.out = mutable_pointer(out);
  op.rounded = rounded;
  if (op.tokens > 0) Device(x).run(op);
}

// The part of a bias (vocab,) for `width` columns from `first` on. `like`: the operand whose logits it is added to.
inline const void* bias_columns(const Tensor& bias, const Tensor& like, int64_t first, int64_t width) {
  check_rank(bias, "bias", 1);
  check_tensor(bias, "bias", like, {bias.size(0)});
  STD_TORCH_CHECK(bias.size(0) - first >= width, "bias must have an entry for each of the columns ", first, " to ",
                  first + width, ", got ", bias.size(0));
  return pointer<char>(bias) + first * size_of(dtype_of(bias, "bias"));
}

inline void check_head(const HeadSpec& head, int64_t first, int64_t outputs, int64_t rounding) {
  STD_TORCH_CHECK(std::isfinite(head.logit_scale), "logit_scale must be finite, got ", head.logit_scale);
  STD_TORCH_CHECK(head.softcap >= 0 && std::isfinite(head.softcap), "softcap must be finite and >= 0, got ", head.softcap);
  STD_TORCH_CHECK(head.temperature > 0 && std::isfinite(head.temperature), "temperature must be finite and > 0, got ",
                  head.temperature);
  STD_TORCH_CHECK(first >= 0, "first must be >= 0, got ", first);
  STD_TORCH_CHECK(outputs >= 0 && outputs <= kAllOutputBits, "outputs must be a sum of 1, 2, 4, 8 and 16, got ", outputs);
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2, "rounding must be 0, 1 or 2, got ", rounding);
}

inline MemoryRows memory_rows(const Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  return {reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1) * size, tensor.stride(0) * size,
          size};
}

template <class Device>
void tile_pass(const Tensor& source, const MaybeTensor& destination, const MaybeTensor& bias, const Tensor& labels,
               const Tensor& k, const MaybeTensor& sums, const MaybeTensor& mix, const MaybeTensor& at_target,
               const MaybeTensor& inverse_temperature, double logit_scale, double softcap, double temperature, int64_t first,
               int64_t outputs, int64_t rounding) {
  check_rank(source, "source", 2);
  const ScalarType acc = accumulate_type(source);
  TilePass op{};
  op.tokens = source.size(0);
  op.width = source.size(1);
  op.head = {logit_scale, softcap, temperature};
  check_head(op.head, first, outputs, rounding);
  check_tensor(source, "source", source, {op.tokens, op.width});
  STD_TORCH_CHECK(op.width <= kMaxColumns, "source must have at most 2^30 columns, got ", op.width);
  STD_TORCH_CHECK(destination.has_value() || sums.has_value(), "destination or sums must be given, got neither");
  check_tensor(destination, "destination", source, {op.tokens, op.width});
  check_tensor(labels, "labels", source, {op.tokens}, ScalarType::Long);
  check_tensor(k, "k", source, {op.tokens}, acc);
  check_tensor(sums, "sums", source, {kNumSums, op.tokens}, ScalarType::Double);
  STD_TORCH_CHECK(!(mix.has_value() && sums.has_value()), "mix must not be given with sums");
  check_tensor(mix, "mix", source, {2, op.tokens}, acc);
  check_tensor(at_target, "at_target", source, {op.tokens}, acc);
  check_tensor(inverse_temperature, "inverse_temperature", source, {op.tokens}, acc);
  op.source = pointer(source);
  op.source_stride = source.stride(0);
  op.source_dtype = dtype_of(source, "source");
  if (destination.has_value()) {
    check_rows_apart(*destination, "destination");
    const Overlap overlap = overlap_of(memory_rows(source), memory_rows(*destination));
    STD_TORCH_CHECK(overlap != Overlap::kOther,
                    "destination must not share memory with source unless each of its rows starts where source's row starts, "
                    "with elements of at most the same size");
    op.overlapping = overlap == Overlap::kNarrowing;
    op.destination = mutable_pointer(*destination);
    op.destination_stride = destination->stride(0);
    op.destination_dtype = dtype_of(*destination, "destination");
    check_output_type<Device>(*destination, "destination", source, "source");
  }
  check_operand_type<Device>(bias, "bias", acc);
  if (bias.has_value()) {
    op.bias = bias_columns(*bias, source, first, op.width);
    op.bias_dtype = dtype_of(*bias, "bias");
  }
  op.labels = pointer<int64_t>(labels);
  op.k = mutable_pointer(k);
  if (sums.has_value()) {
    check_rows_apart(*sums, "sums");
    op.sums = mutable_pointer<double>(*sums);
    op.sums_stride = sums->stride(0);
  }
  op.mix = pointer(mix);
  if (mix.has_value()) op.mix_stride = mix->stride(0);
  op.at_target = pointer(at_target);
  op.inverse_temperature = pointer(inverse_temperature);
  op.first = first;
  op.outputs = static_cast<int>(outputs);
  op.rounding = static_cast<Rounding>(rounding);
  if (op.tokens > 0 && op.width > 0) Device(source).run(op);
}

template <class Device>
void pair_loss(const Tensor& logps, const MaybeTensor& weights, const Tensor& offsets, const MaybeTensor& ref_logps,
               int64_t kind, bool mean, double beta, double gamma, double label_smoothing, double scale, const Tensor& losses,
               const Tensor& sequence_logps, const MaybeTensor& coefficients) {
  check_rank(logps, "logps", 1);
  check_rank(losses, "losses", 1);
  PairLoss op{};
  const int64_t tokens = logps.size(0);
  op.pairs = losses.size(0);
  check_tensor(logps, "logps", logps, {tokens});
  check_accumulate_type(logps, "logps");
  check_tensor(weights, "weights", logps, {tokens});
  check_operand_type<Device>(weights, "weights", ScalarType::Double);
  check_tensor(offsets, "offsets", logps, {2 * op.pairs + 1}, ScalarType::Long);
  check_tensor(losses, "losses", logps, {op.pairs}, ScalarType::Double);
  check_tensor(sequence_logps, "sequence_logps", logps, {2 * op.pairs}, ScalarType::Double);
  check_tensor(ref_logps, "ref_logps", logps, {2 * op.pairs}, ScalarType::Double);
  check_tensor(coefficients, "coefficients", logps, {tokens}, logps.scalar_type());
  STD_TORCH_CHECK(kind >= 0 && kind < kMarginFunctions, "kind must be 0, 1 or 2, got ", kind);
  op.logps = pointer(logps);
  op.logps_dtype = dtype_of(logps, "logps");
  op.weights = pointer(weights);
  if (weights.has_value()) {
    op.weights_dtype = weights->scalar_type() == ScalarType::Bool ? DType::kBool : dtype_of(*weights, "weights");
  }
  op.offsets = pointer<int64_t>(offsets);
  op.ref_logps = pointer<double>(ref_logps);
  op.loss = {static_cast<int>(kind), beta, gamma, label_smoothing};
  op.mean = mean;
  op.scale = scale;
  op.losses = mutable_pointer<double>(losses);
  op.sequence_logps = mutable_pointer<double>(sequence_logps);
  op.coefficients = mutable_pointer(coefficients);
  if (op.pairs == 0) return;
  if constexpr (Device::kHostMemory) {
    const int64_t first = op.offsets[0], last = op.offsets[2 * op.pairs];
    STD_TORCH_CHECK(first >= 0 && last <= tokens, "offsets must be between 0 and the ", tokens, " elements of logps, got ",
                    first, " to ", last);
  }
  Device(logps).run(op);
}

template <class Device>
void scale_scatter(const Tensor& values, const Tensor& rows, const Tensor& factor, const Tensor& out) {
  check_rank(values, "values", 2);
  check_rank(factor, "factor", 1);
  check_rank(out, "out", 2);
  ScaleScatter op{};
  op.tokens = values.size(0);
  op.hidden = values.size(1);
  op.out_rows = out.size(0);
  check_tensor(values, "values", values, {op.tokens, op.hidden});
  check_accumulate_type(values, "values");
  check_tensor(rows, "rows", values, {op.tokens}, ScalarType::Long);
  check_tensor(factor, "factor", values, {factor.size(0) == 1 ? 1 : op.tokens}, values.scalar_type());
  check_tensor(out, "out", values, {op.out_rows, op.hidden});
  check_rows_apart(out, "out");
  op.values = pointer(values);
  op.values_stride = values.stride(0);
  op.values_dtype = dtype_of(values, "values");
  op.rows = pointer<int64_t>(rows);
  op.factor = pointer(factor);
  op.factor_stride = factor.size(0) == 1 ? 0 : 1;
  op.out = mutable_pointer(out);
  op.out_stride = out.stride(0);
  op.out_dtype = dtype_of(out, "out");
  check_output_type<Device>(out, "out", values, "values");
  if (op.tokens > 0 && op.hidden > 0) Device(values).run(op);
}

template <class Device>
void scaled_convert(const Tensor& source, const Tensor& factor, const Tensor& out) {
  check_contiguous(source, "source");
  check_operand_type<Device>(source, "source", accumulate_type(source));
  check_tensor(factor, "factor", source, {1}, accumulate_type(source));
  check_device(out, "out", source);
  check_rank(out, "out", source.dim());
  for (int64_t dim = 0; dim < source.dim(); ++dim) check_size(out, "out", dim, source.size(dim));
  check_contiguous(out, "out");
  ScaledConvert op{};
  op.count = source.numel();
  const auto flat = [&op](const Tensor& tensor) -> MemoryRows {
    const auto size = static_cast<int64_t>(tensor.element_size());
    return {reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), 1, op.count * size, 0, size};
  };
  const Overlap overlap = overlap_of(flat(source), flat(out));
  STD_TORCH_CHECK(overlap == Overlap::kNone || overlap == Overlap::kSame,
                  "out must not share memory with source unless it is the same elements");
  op.source = pointer(source);
  op.source_dtype = dtype_of(source, "source");
  op.factor = pointer(factor);
  op.out = mutable_pointer(out);
  op.out_dtype = dtype_of(out, "out");
  check_output_type<Device>(out, "out", source, "source");
  if (op.count > 0) Device(source).run(op);
}

template <class Device>
void finish_tile(const Tensor& tile, const MaybeTensor& factors, const Tensor& labels, const MaybeTensor& at_target,
                 int64_t width) {
  check_rank(tile, "tile", 2);
  STD_TORCH_CHECK(width > 0, "width must be > 0, got ", width);
  const ScalarType acc = accumulate_type(tile);
  FinishTile op{};
  op.tokens = tile.size(0);
  op.columns = tile.size(1);
  op.width = width;
  op.blocks = op.columns / width + (op.columns % width != 0);
  check_tensor(tile, "tile", tile, {op.tokens, op.columns});
  check_rows_apart(tile, "tile");
  STD_TORCH_CHECK(op.columns <= kMaxColumns, "tile must have at most 2^30 columns, got ", op.columns);
  check_tensor(factors, "factors", tile, {op.blocks, op.tokens}, acc);
  check_tensor(labels, "labels", tile, {op.tokens}, ScalarType::Long);
  check_tensor(at_target, "at_target", tile, {op.tokens}, acc);
  op.tile = mutable_pointer(tile);
  op.tile_stride = tile.stride(0);
  op.tile_dtype = dtype_of(tile, "tile");
  op.factors = pointer(factors);
  if (factors.has_value()) op.factors_stride = factors->stride(0);
  op.labels = pointer<int64_t>(labels);
  op.at_target = pointer(at_target);
  if (op.tokens > 0 && op.columns > 0) Device(tile).run(op);
}

// Registers the operators above for a device.
template <class Device>
void implement_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("indexed_dot", TORCH_BOX(&indexed_dot<Device>));
  m.impl("tile_pass", TORCH_BOX(&tile_pass<Device>));
  m.impl("pair_loss", TORCH_BOX(&pair_loss<Device>));
  m.impl("scale_scatter", TORCH_BOX(&scale_scatter<Device>));
  m.impl("scaled_convert", TORCH_BOX(&scaled_convert<Device>));
  m.impl("finish_tile", TORCH_BOX(&finish_tile<Device>));
}

}  // namespace logitless::bindings
