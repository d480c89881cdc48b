// The operators on CPUs. Those of both devices are in ../bindings/operators.h; here are a CPU's part of them, and the operators
// that only CPUs have.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../bindings/checks.h"
#include "../bindings/operators.h"
#include "gemm.h"
#include "logitless/cpu/kernels.h"
#include "logitless/cpu/ops.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::bindings {
namespace {

using cpu::kernels, cpu::run_parallel, cpu::small_gemm, cpu::release_gemm;

struct Cpu {
  static constexpr bool kMixesTypes = false, kHostMemory = true;

  explicit Cpu(const Tensor&) {}
  void run(const IndexedDot& op) const { kernels().indexed_dot(op, run_parallel); }
  void run(const TilePass& op) const { kernels().tile_pass(op, run_parallel); }
  void run(const PairLoss& op) const { cpu::pair_loss(op, run_parallel); }
  void run(const ScaleScatter& op) const { kernels().scale_scatter(op, run_parallel); }
  void run(const ScaledConvert& op) const { kernels().scaled_convert(op, run_parallel); }
  void run(const FinishTile& op) const { kernels().finish_tile(op, run_parallel); }
};

// A weight (rows, hidden) as the small GEMM takes it: any type that can be rounded to bfloat16.
void check_gemm_weight(const Tensor& weight, const Tensor& like, int64_t rows, int64_t hidden) {
  check_tensor(weight, "weight", like, {rows, hidden});
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double, "weight must be float32, bfloat16 or float16, got float64");
}

cpu::Pack pack_arguments(const Tensor& x, const Tensor& out) {
  check_rank(x, "x", 2);
  cpu::Pack op{};
  op.tokens = x.size(0);
  op.hidden = x.size(1);
  check_tensor(x, "x", x, {op.tokens, op.hidden}, ScalarType::BFloat16);
  op.x = pointer<uint16_t>(x);
  op.x_stride = x.stride(0);
  op.out = mutable_pointer<uint16_t>(out);
  return op;
}

void check_even(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(1) % 2 == 0, name, " must have an even number of columns, got ", tensor.size(1));
}

void pack_tokens(const Tensor& x, const Tensor& out) {
  const cpu::Pack op = pack_arguments(x, out);
  check_even(x, "x");
  check_buffer(out, "out", x, cpu::packed_tokens_size(op.tokens, op.hidden), ScalarType::BFloat16);
  kernels().pack_tokens(op, run_parallel);
}

void pack_rows(const Tensor& x, const Tensor& scale, const Tensor& out) {
  cpu::Pack op = pack_arguments(x, out);
  check_tensor(scale, "scale", x, {op.tokens}, ScalarType::Float);
  check_buffer(out, "out", x, cpu::packed_rows_size(op.tokens, op.hidden), ScalarType::BFloat16);
  op.scale = pointer<float>(scale);
  kernels().pack_rows(op, run_parallel);
}

void score_block(const Tensor& packed, const Tensor& weight, const MaybeTensor& bias, const Tensor& labels,
                 const MaybeTensor& start, const Tensor& k, const MaybeTensor& sums, const MaybeTensor& mix,
                 const MaybeTensor& inverse_temperature, const MaybeTensor& gradient, double logit_scale, double softcap,
                 double temperature, int64_t first, int64_t outputs, int64_t rounding) {
  check_rank(weight, "weight", 2);
  check_even(weight, "weight");
  check_rank(labels, "labels", 1);
  cpu::ScoreBlock op{};
  op.tokens = labels.size(0);
  op.width = weight.size(0);
  op.hidden = weight.size(1);
  op.head = {logit_scale, softcap, temperature};
  check_head(op.head, first, outputs, rounding);
  check_gemm_weight(weight, packed, op.width, op.hidden);
  check_buffer(packed, "packed", packed, cpu::packed_tokens_size(op.tokens, op.hidden), ScalarType::BFloat16);
  check_tensor(labels, "labels", packed, {op.tokens}, ScalarType::Long);
  check_tensor(start, "start", packed, {op.tokens}, ScalarType::Float);
  STD_TORCH_CHECK(start.has_value() || !sums.has_value(), "start must be given with sums, got None");
  check_tensor(k, "k", packed, {op.tokens}, ScalarType::Float);
  check_buffer(sums, "sums", packed, kNumSums * op.tokens, ScalarType::Double);
  check_buffer(mix, "mix", packed, 2 * op.tokens, ScalarType::Float);
  check_tensor(inverse_temperature, "inverse_temperature", packed, {op.tokens}, ScalarType::Float);
  check_buffer(gradient, "gradient", packed, op.width * op.tokens, ScalarType::BFloat16);
  op.packed = pointer<uint16_t>(packed);
  op.weight = pointer(weight);
  op.weight_stride = weight.stride(0);
  op.weight_dtype = dtype_of(weight, "weight");
  if (bias.has_value()) {
    check_type(*bias, "bias", ScalarType::Float);
    op.bias = static_cast<const float*>(bias_columns(*bias, packed, first, op.width));
  }
  op.labels = pointer<int64_t>(labels);
  op.start = pointer<float>(start);
  op.k = mutable_pointer<float>(k);
  op.sums = mutable_pointer<double>(sums);
  op.mix = pointer<float>(mix);
  op.inverse_temperature = pointer<float>(inverse_temperature);
  op.gradient = mutable_pointer<uint16_t>(gradient);
  op.first = first;
  op.outputs = static_cast<int>(outputs);
  op.rounding = static_cast<Rounding>(rounding);
  kernels().score_block(op, run_parallel, small_gemm, release_gemm);
}

void grad_hidden(const Tensor& gradient, const Tensor& weight, const Tensor& dhidden) {
  check_rank(weight, "weight", 2);
  check_rank(dhidden, "dhidden", 2);
  cpu::GradHidden op{};
  op.tokens = dhidden.size(0);
  op.hidden = weight.size(1);
  op.width = weight.size(0);
  check_gemm_weight(weight, gradient, op.width, op.hidden);
  check_buffer(gradient, "gradient", gradient, op.width * op.tokens, ScalarType::BFloat16);
  check_buffer(dhidden, "dhidden", gradient, op.tokens * op.hidden, ScalarType::Float);
  op.gradient = pointer<uint16_t>(gradient);
  op.weight = pointer(weight);
  op.weight_stride = weight.stride(0);
  op.weight_dtype = dtype_of(weight, "weight");
  op.dhidden = mutable_pointer<float>(dhidden);
  op.threads = cpu::num_threads();
  kernels().grad_hidden(op, run_parallel, small_gemm, release_gemm);
}

void finish_rows(const Tensor& values, const Tensor& scale, const Tensor& target, const Tensor& weight, const Tensor& labels) {
  check_rank(values, "values", 2);
  check_rank(weight, "weight", 2);
  cpu::FinishRows op{};
  op.tokens = values.size(0);
  op.hidden = values.size(1);
  check_buffer(values, "values", values, op.tokens * op.hidden, ScalarType::Float);
  check_tensor(scale, "scale", values, {op.tokens}, ScalarType::Float);
  check_tensor(target, "target", values, {op.tokens}, ScalarType::Float);
  check_gemm_weight(weight, values, weight.size(0), op.hidden);
  check_tensor(labels, "labels", values, {op.tokens}, ScalarType::Long);
  op.values = mutable_pointer<float>(values);
  op.scale = pointer<float>(scale);
  op.target = pointer<float>(target);
  op.weight = pointer(weight);
  op.weight_stride = weight.stride(0);
  op.weight_dtype = dtype_of(weight, "weight");
  op.labels = pointer<int64_t>(labels);
  kernels().finish_rows(op, run_parallel);
}

void grad_weight(const Tensor& gradient, const MaybeTensor& packed, const Tensor& x, const Tensor& scale, const Tensor& values,
                 const Tensor& labels, int64_t first, int64_t width, bool accumulate, const MaybeTensor& dweight,
                 const MaybeTensor& dbias) {
  check_rank(x, "x", 2);
  cpu::GradWeight op{};
  op.tokens = x.size(0);
  op.hidden = x.size(1);
  op.width = width;
  op.first = first;
  op.accumulate = accumulate;
  check_tensor(x, "x", x, {op.tokens, op.hidden}, ScalarType::BFloat16);
  check_buffer(gradient, "gradient", x, op.width * op.tokens, ScalarType::BFloat16);
  STD_TORCH_CHECK(packed.has_value() || !dweight.has_value(), "packed must be given with dweight, got None");
  check_buffer(packed, "packed", x, cpu::packed_rows_size(op.tokens, op.hidden), ScalarType::BFloat16);
  check_tensor(scale, "scale", x, {op.tokens}, ScalarType::Float);
  check_tensor(values, "values", x, {op.tokens}, ScalarType::Float);
  check_tensor(labels, "labels", x, {op.tokens}, ScalarType::Long);
  if (dweight.has_value()) {
    check_buffer(*dweight, "dweight", x, op.width * op.hidden, dweight->scalar_type());
    op.dweight_dtype = dtype_of(*dweight, "dweight");
    STD_TORCH_CHECK(op.dweight_dtype == DType::kFloat32 || (op.dweight_dtype != DType::kFloat64 && !accumulate),
                    "dweight must be float32, or without accumulate bfloat16 or float16, got ", name_of(dweight->scalar_type()),
                    accumulate ? " with accumulate" : "");
  }
  check_tensor(dbias, "dbias", x, {op.width}, ScalarType::Float);
  op.gradient = pointer<uint16_t>(gradient);
  op.packed = pointer<uint16_t>(packed);
  op.x = pointer<uint16_t>(x);
  op.x_stride = x.stride(0);
  op.scale = pointer<float>(scale);
  op.values = pointer<float>(values);
  op.labels = pointer<int64_t>(labels);
  op.dweight = mutable_pointer(dweight);
  op.dbias = mutable_pointer<float>(dbias);
  kernels().grad_weight(op, run_parallel, small_gemm, release_gemm);
}

}  // namespace
}  // namespace logitless::bindings

STABLE_TORCH_LIBRARY_IMPL(logitless, CPU, m) {
  using namespace logitless::bindings;
  implement_operators<Cpu>(m);
  m.impl("pack_tokens", TORCH_BOX(&pack_tokens));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("score_block", TORCH_BOX(&score_block));
  m.impl("grad_hidden", TORCH_BOX(&grad_hidden));
  m.impl("finish_rows", TORCH_BOX(&finish_rows));
  m.impl("grad_weight", TORCH_BOX(&grad_weight));
}

// For the loader, which asks before any operator runs.
extern "C" {
__attribute__((visibility("default"))) const char* logitless_schemas() { return LOGITLESS_SCHEMAS; }
__attribute__((visibility("default"))) const char* logitless_cpu_isa() { return logitless::cpu::kernels().name; }
__attribute__((visibility("default"))) int logitless_cpu_has_bf16_gemm() { return logitless::cpu::has_small_gemm(); }
}
