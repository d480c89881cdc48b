// The operators of kernels/operators/native.py for CUDA tensors, on the stable ABI of LibTorch: one build serves torch 2.10 and later.
//
// Here arguments are checked and pointers taken out of tensors; kernels and their launches know nothing of torch.

// What of the stable ABI may be used: no more than torch 2.10 has. And its part about CUDA, which the headers declare for those
// who say that they build for CUDA; a wheel without CUDA carries the same declarations.
#if !defined(TORCH_TARGET_VERSION)
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif
#if !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "logitless/cuda/ops.cuh"
#include "overlap.h"

// The tests compile this file against the emulator and register it beside the real operators.
#if defined(LOGITLESS_CUDA_EMULATOR)
#define LOGITLESS_NAMESPACE logitless_emulated
#define LOGITLESS_DISPATCH_KEY CPU
#else
#define LOGITLESS_NAMESPACE logitless
#define LOGITLESS_DISPATCH_KEY CUDA
#endif

namespace {

using logitless::cuda::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#if defined(LOGITLESS_CUDA_EMULATOR)
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  template <typename Op>
  void run(const Op& op) const {
    logitless::cuda::launch(op, nullptr);
  }
};
constexpr bool is_on_device(const Tensor&) { return true; }
#else
// Makes the tensor's device current while it lives, and launches on that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  template <typename Op>
  void run(const Op& op) const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    logitless::cuda::launch(op, static_cast<cudaStream_t>(stream));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another type";
  }
}

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", name_of(tensor.scalar_type()));
  }
  return DType::kFloat32;
}

// float32, and float64 for float64 data.
ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_type(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", got ", name_of(tensor.scalar_type()));
}

// On `like`'s device, of the given shape, with neighbours in the last dimension next to each other.
void check(const Tensor& tensor, const char* name, const Tensor& like, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(is_on_device(tensor), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " must be on device ", like.get_device_index(),
                  " as the other arguments, got ", tensor.get_device_index());
  const auto rank = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimension(s), got ", tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ",
                    tensor.size(dim));
    ++dim;
  }
  STD_TORCH_CHECK(tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1, name,
                  " must have stride 1 in its last dimension, got ", tensor.stride(rank - 1));
}

void check_rank(const Tensor& tensor, const char* name, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimension(s), got ", tensor.dim());
}

// Rows that are written must not share memory.
void check_rows_apart(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), name,
                  " must have rows that do not overlap, got a row stride of ", tensor.stride(0), " for ", tensor.size(1),
                  " columns");
}

const void* pointer(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }
void* mutable_pointer(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr; }
const int64_t* indices(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

void indexed_dot(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels, bool match,
                 const Tensor& out) {
  check_rank(x, "x", 2);
  check_rank(weight, "weight", 2);
  const int64_t n = x.size(0), hidden = x.size(1), vocab = weight.size(0);
  check(x, "x", x, {n, hidden});
  check(weight, "weight", x, {vocab, hidden});
  if (bias.has_value()) check(*bias, "bias", x, {vocab});
  check(labels, "labels", x, {n});
  check_type(labels, "labels", ScalarType::Long);
  check(out, "out", x, {n});
  check_type(out, "out", accumulate_type(x));
  if (n == 0) return;
  logitless::cuda::IndexedDot op{};
  op.x = x.const_data_ptr();
  op.x_stride = x.stride(0);
  op.x_dtype = dtype_of(x, "x");
  op.weight = weight.const_data_ptr();
  op.weight_stride = weight.stride(0);
  op.weight_dtype = dtype_of(weight, "weight");
  op.bias = pointer(bias);
  if (bias.has_value()) op.bias_dtype = dtype_of(*bias, "bias");
  op.labels = indices(labels);
  op.out = out.mutable_data_ptr();
  op.n = n;
  op.hidden = hidden;
  op.vocab = vocab;
  op.match = match;
  OnDevice(x).run(op);
}

logitless::MemoryRows memory_rows(const Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  return {reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1) * size, tensor.stride(0) * size,
          size};
}

void tile_pass(const Tensor& source, const MaybeTensor& destination, const MaybeTensor& bias, const Tensor& labels,
               const Tensor& k, const MaybeTensor& sums, const MaybeTensor& mix, const MaybeTensor& at_target,
               double logit_scale, double softcap, double temperature, int64_t first, int64_t outputs, int64_t rounding) {
  check_rank(source, "source", 2);
  const int64_t n = source.size(0), width = source.size(1);
  const ScalarType acc = accumulate_type(source);
  check(source, "source", source, {n, width});
  STD_TORCH_CHECK(width <= INT32_MAX / 2, "source must have at most 2^30 columns, got ", width);
  check(labels, "labels", source, {n});
  check_type(labels, "labels", ScalarType::Long);
  check(k, "k", source, {n});
  check_type(k, "k", acc);
  STD_TORCH_CHECK(destination.has_value() || sums.has_value(), "destination or sums must be given, got neither");
  logitless::Overlap overlap = logitless::Overlap::kNone;
  if (destination.has_value()) {
    check(*destination, "destination", source, {n, width});
    check_rows_apart(*destination, "destination");
    overlap = logitless::overlap_of(memory_rows(source), memory_rows(*destination));
    STD_TORCH_CHECK(overlap != logitless::Overlap::kOther,
                    "destination must not share memory with source unless each of its rows starts where source's row starts, "
                    "with elements of at most the same size");
  }
  STD_TORCH_CHECK(first >= 0, "first must be >= 0, got ", first);
  if (bias.has_value()) {
    check_rank(*bias, "bias", 1);
    check(*bias, "bias", source, {bias->size(0)});
    STD_TORCH_CHECK(bias->size(0) - first >= width, "bias must have an entry for each of the columns ", first, " to ",
                    first + width, ", got ", bias->size(0));
  }
  if (sums.has_value()) {
    check(*sums, "sums", source, {logitless::cuda::kTileSums, n});
    check_type(*sums, "sums", ScalarType::Double);
    check_rows_apart(*sums, "sums");
  }
  if (mix.has_value()) {
    STD_TORCH_CHECK(!sums.has_value(), "mix must not be given with sums");
    check(*mix, "mix", source, {2, n});
    check_type(*mix, "mix", acc);
  }
  if (at_target.has_value()) {
    check(*at_target, "at_target", source, {n});
    check_type(*at_target, "at_target", acc);
  }
  STD_TORCH_CHECK(std::isfinite(logit_scale), "logit_scale must be finite, got ", logit_scale);
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be finite and >= 0, got ", softcap);
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature must be finite and > 0, got ", temperature);
  STD_TORCH_CHECK(outputs >= 0 && outputs < 32, "outputs must be a sum of 1, 2, 4, 8 and 16, got ", outputs);
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2, "rounding must be 0, 1 or 2, got ", rounding);
  if (n == 0 || width == 0) return;
  logitless::cuda::TilePass op{};
  op.source = source.const_data_ptr();
  op.source_stride = source.stride(0);
  op.source_dtype = dtype_of(source, "source");
  op.destination = mutable_pointer(destination);
  if (destination.has_value()) {
    op.destination_stride = destination->stride(0);
    op.destination_dtype = dtype_of(*destination, "destination");
  }
  op.overlapping = overlap == logitless::Overlap::kNarrowing;
  if (bias.has_value()) {
    op.bias_dtype = dtype_of(*bias, "bias");
    op.bias = static_cast<const char*>(bias->const_data_ptr()) + first * logitless::cuda::size_of(op.bias_dtype);
  }
  op.labels = indices(labels);
  op.k = k.mutable_data_ptr();
  if (sums.has_value()) {
    op.sums = doubles(*sums);
    op.sums_stride = sums->stride(0);
  }
  op.mix = pointer(mix);
  if (mix.has_value()) op.mix_stride = mix->stride(0);
  op.at_target = pointer(at_target);
  op.logit_scale = logit_scale;
  op.softcap = softcap;
  op.temperature = temperature;
  op.first = first;
  op.n = n;
  op.width = width;
  op.outputs = static_cast<int>(outputs);
  op.rounding = static_cast<int>(rounding);
  OnDevice(source).run(op);
}

void pair_loss(const Tensor& logps, const MaybeTensor& weights, const Tensor& offsets, const MaybeTensor& ref_logps,
               int64_t kind, bool mean, double beta, double gamma, double label_smoothing, double scale, const Tensor& losses,
               const Tensor& sequence_logps, const MaybeTensor& coefficients) {
  check_rank(logps, "logps", 1);
  check_rank(losses, "losses", 1);
  const int64_t tokens = logps.size(0), pairs = losses.size(0);
  check(logps, "logps", logps, {tokens});
  STD_TORCH_CHECK(logps.scalar_type() == accumulate_type(logps), "logps must be float32 or float64, got ",
                  name_of(logps.scalar_type()));
  if (weights.has_value()) check(*weights, "weights", logps, {tokens});
  check(offsets, "offsets", logps, {2 * pairs + 1});
  check_type(offsets, "offsets", ScalarType::Long);
  check(losses, "losses", logps, {pairs});
  check_type(losses, "losses", ScalarType::Double);
  check(sequence_logps, "sequence_logps", logps, {2 * pairs});
  check_type(sequence_logps, "sequence_logps", ScalarType::Double);
  if (ref_logps.has_value()) {
    check(*ref_logps, "ref_logps", logps, {2 * pairs});
    check_type(*ref_logps, "ref_logps", ScalarType::Double);
  }
  if (coefficients.has_value()) {
    check(*coefficients, "coefficients", logps, {tokens});
    check_type(*coefficients, "coefficients", logps.scalar_type());
  }
  STD_TORCH_CHECK(kind >= 0 && kind < logitless::kPairLossKinds, "kind must be 0, 1 or 2, got ", kind);
  if (pairs == 0) return;
  logitless::cuda::PairLossPass op{};
  op.logps = logps.const_data_ptr();
  op.logps_dtype = dtype_of(logps, "logps");
  op.weights = pointer(weights);
  if (weights.has_value()) {
    op.weights_dtype = weights->scalar_type() == ScalarType::Bool ? DType::kBool : dtype_of(*weights, "weights");
  }
  op.offsets = indices(offsets);
  op.ref_logps = static_cast<const double*>(pointer(ref_logps));
  op.loss = {static_cast<int>(kind), beta, gamma, label_smoothing};
  op.mean = mean;
  op.scale = scale;
  op.losses = doubles(losses);
  op.sequence_logps = doubles(sequence_logps);
  op.coefficients = mutable_pointer(coefficients);
  op.pairs = pairs;
  OnDevice(logps).run(op);
}

void scale_scatter(const Tensor& values, const Tensor& rows, const Tensor& factor, const Tensor& out) {
  check_rank(values, "values", 2);
  check_rank(factor, "factor", 1);
  check_rank(out, "out", 2);
  const int64_t n = values.size(0), width = values.size(1);
  check(values, "values", values, {n, width});
  STD_TORCH_CHECK(values.scalar_type() == accumulate_type(values), "values must be float32 or float64, got ",
                  name_of(values.scalar_type()));
  check(rows, "rows", values, {n});
  check_type(rows, "rows", ScalarType::Long);
  check(factor, "factor", values, {factor.size(0) == 1 ? 1 : n});
  check_type(factor, "factor", values.scalar_type());
  check(out, "out", values, {out.size(0), width});
  check_rows_apart(out, "out");
  if (n == 0 || width == 0) return;
  logitless::cuda::ScaleScatter op{};
  op.values = values.const_data_ptr();
  op.values_stride = values.stride(0);
  op.values_dtype = dtype_of(values, "values");
  op.rows = indices(rows);
  op.factor = factor.const_data_ptr();
  op.factor_stride = factor.size(0) == 1 ? 0 : 1;
  op.out = out.mutable_data_ptr();
  op.out_stride = out.stride(0);
  op.out_dtype = dtype_of(out, "out");
  op.n = n;
  op.width = width;
  op.out_rows = out.size(0);
  OnDevice(values).run(op);
}

void scaled_convert(const Tensor& source, const Tensor& factor, const Tensor& out) {
  STD_TORCH_CHECK(is_on_device(source), "source must be a CUDA tensor");
  STD_TORCH_CHECK(source.is_contiguous(), "source must be contiguous");
  check(factor, "factor", source, {1});
  check_type(factor, "factor", accumulate_type(source));
  STD_TORCH_CHECK(is_on_device(out) && out.get_device_index() == source.get_device_index(), "out must be on source's device");
  STD_TORCH_CHECK(out.dim() == source.dim(), "out must have ", source.dim(), " dimension(s), got ", out.dim());
  for (int64_t dim = 0; dim < source.dim(); ++dim) {
    STD_TORCH_CHECK(out.size(dim) == source.size(dim), "out must have size ", source.size(dim), " in dimension ", dim, ", got ",
                    out.size(dim));
  }
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const int64_t count = source.numel();
  const auto flat = [count](const Tensor& tensor) -> logitless::MemoryRows {
    const auto size = static_cast<int64_t>(tensor.element_size());
    return {reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), 1, count * size, 0, size};
  };
  const logitless::Overlap overlap = logitless::overlap_of(flat(source), flat(out));
  STD_TORCH_CHECK(overlap == logitless::Overlap::kNone || overlap == logitless::Overlap::kSame,
                  "out must not share memory with source unless it is the same elements");
  if (count == 0) return;
  logitless::cuda::ScaledConvert op{};
  op.source = source.const_data_ptr();
  op.source_dtype = dtype_of(source, "source");
  op.factor = factor.const_data_ptr();
  op.out = out.mutable_data_ptr();
  op.out_dtype = dtype_of(out, "out");
  op.count = count;
  OnDevice(source).run(op);
}

void finish_tile(const Tensor& tile, const MaybeTensor& factors, const Tensor& labels, const MaybeTensor& at_target,
                 int64_t width) {
  check_rank(tile, "tile", 2);
  const int64_t n = tile.size(0), columns = tile.size(1);
  const ScalarType acc = accumulate_type(tile);
  check(tile, "tile", tile, {n, columns});
  check_rows_apart(tile, "tile");
  STD_TORCH_CHECK(columns <= INT32_MAX / 2, "tile must have at most 2^30 columns, got ", columns);
  STD_TORCH_CHECK(width > 0, "width must be > 0, got ", width);
  const int64_t blocks = columns / width + (columns % width != 0);
  if (factors.has_value()) {
    check(*factors, "factors", tile, {blocks, n});
    check_type(*factors, "factors", acc);
  }
  check(labels, "labels", tile, {n});
  check_type(labels, "labels", ScalarType::Long);
  if (at_target.has_value()) {
    check(*at_target, "at_target", tile, {n});
    check_type(*at_target, "at_target", acc);
  }
  const DType tile_dtype = dtype_of(tile, "tile");
  if (n == 0 || columns == 0) return;
  logitless::cuda::FinishTile op{};
  op.tile = tile.mutable_data_ptr();
  op.tile_stride = tile.stride(0);
  op.tile_dtype = tile_dtype;
  op.factors = pointer(factors);
  if (factors.has_value()) op.factors_stride = factors->stride(0);
  op.labels = indices(labels);
  op.at_target = pointer(at_target);
  op.n = n;
  op.columns = columns;
  op.width = width;
  op.blocks = blocks;
  OnDevice(tile).run(op);
}

}  // namespace

// Two steps, for the namespace and the key to be expanded before the macro makes names of them.
#define LOGITLESS_IMPLEMENT(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)

LOGITLESS_IMPLEMENT(LOGITLESS_NAMESPACE, LOGITLESS_DISPATCH_KEY, m) {
  m.impl("indexed_dot", TORCH_BOX(&indexed_dot));
  m.impl("tile_pass", TORCH_BOX(&tile_pass));
  m.impl("pair_loss", TORCH_BOX(&pair_loss));
  m.impl("scale_scatter", TORCH_BOX(&scale_scatter));
  m.impl("scaled_convert", TORCH_BOX(&scaled_convert));
  m.impl("finish_tile", TORCH_BOX(&finish_tile));
}
