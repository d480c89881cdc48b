// Calls every CPU kernel on arrays of exact size, from real threads, and compares with double precision. Meant to be compiled
// with sanitizers: see test_cpu_sanitized.py. LOGITLESS_CPU_ISA picks the kernels; the argument "name" prints which they are,
// "few" leaves most combinations out.
#include <algorithm>
#include <string>

#include "cpu_sanitized.h"
#include "cpu_sanitized_scores.h"

namespace logitless::cpu::sanitized {
namespace {

void grad_hidden(DType weight_type, int64_t rows, int64_t hidden, int64_t width, int64_t threads, uint64_t seed) {
  Random random(seed);
  const int64_t stride = hidden + seed % 3;
  const Array gradient = matrix(BF16, width, rows, rows, random), w = matrix(weight_type, width, hidden, stride, random);
  Array dhidden = matrix(F32, rows, hidden, hidden, random);
  const Array before = dhidden;
  const GradHidden op{.gradient = gradient.bf16(),
                      .weight = w.data(),
                      .weight_stride = stride,
                      .weight_dtype = weight_type,
                      .dhidden = dhidden.floats(),
                      .tokens = rows,
                      .hidden = hidden,
                      .width = width,
                      .threads = threads};
  kernels().grad_hidden(op, run_threads, small_gemm, release_gemm);
  const std::vector<double> gs = seen(gradient, BF16), ws = seen(w, BF16);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t h = 0; h < hidden; ++h) {
      double want = before[t * hidden + h], size = std::fabs(want);
      for (int64_t v = 0; v < width; ++v) {
        const double term = gs[size_t(v * rows + t)] * ws[size_t(v * stride + h)];
        want += term;
        size += std::fabs(term);
      }
      expect_near("dhidden", t * hidden + h, dhidden[t * hidden + h], want, size * unit(F32) * double(2 + width / 512));
    }
  }
}

void grad_weight(int64_t rows, int64_t hidden, int64_t width, bool accumulate, DType type, bool with_weight, bool with_bias,
                 uint64_t seed) {
  Random random(seed);
  const int64_t first = 11, x_stride = hidden + seed % 3, even = round_up(rows, 2);
  const Array gradient = matrix(BF16, width, rows, rows, random), x = matrix(BF16, rows, hidden, x_stride, random);
  const Array scale(F32, rows, [&](int64_t) { return random.normal(); }),
      values(F32, rows, [&](int64_t) { return random.normal(); });
  const Labels labels(rows, [&](int64_t) { return first - 2 + random.below(width + 4); });
  Array packed(BF16, packed_rows_size(rows, hidden));
  const Pack pack{
      .x = x.bf16(), .x_stride = x_stride, .scale = scale.floats(), .out = packed.bf16(), .tokens = rows, .hidden = hidden};
  kernels().pack_rows(pack, run_threads);
  const std::vector<double> xs = seen(x, BF16), gs = seen(gradient, BF16);
  std::vector<double> scaled;
  for (int64_t i = 0; i < rows * hidden; ++i) {
    scaled.push_back(stored(float(x[i / hidden * x_stride + i % hidden]) * float(scale[i / hidden]), BF16));
  }
  for (int64_t t = 0; t < even; ++t) {
    for (int64_t h = 0; h < hidden; ++h) {
      const int64_t at = h / kHiddenBlock * kHiddenBlock * even + t / 2 * kHiddenBlock * 2 + h % kHiddenBlock * 2 + t % 2;
      expect_near("packed row", at, packed[at], t < rows ? scaled[size_t(t * hidden + h)] : 0, 0);
    }
  }

  Array dweight(type, with_weight ? width * hidden : 0), dbias(F32, with_bias ? width : 0, [](int64_t) { return 1.0; });
  for (int64_t i = 0; accumulate && i < dweight.size(); ++i) dweight.set(i, random.normal());
  const Array before = dweight;
  GradWeight p{};
  p.gradient = gradient.bf16();
  p.packed = with_weight ? packed.bf16() : nullptr;
  p.x = x.bf16();
  p.x_stride = x_stride;
  p.scale = scale.floats();
  p.values = values.floats();
  p.labels = labels.data();
  p.dweight = with_weight ? dweight.data() : nullptr;
  p.dweight_dtype = type;
  p.accumulate = accumulate;
  p.dbias = with_bias ? dbias.floats() : nullptr;
  p.tokens = rows;
  p.hidden = hidden;
  p.width = width;
  p.first = first;
  kernels().grad_weight(p, run_threads, small_gemm, release_gemm);
  for (int64_t v = 0; v < width; ++v) {
    for (int64_t h = 0; with_weight && h < hidden; ++h) {
      double want = accumulate ? before[v * hidden + h] : 0, size = std::fabs(want);
      for (int64_t t = 0; t < rows; ++t) {
        const double term = gs[size_t(v * rows + t)] * scaled[size_t(t * hidden + h)];
        const double label = labels[t] - first == v ? xs[size_t(t * x_stride + h)] * values[t] : 0;
        want += term + label;
        size += std::fabs(term) + std::fabs(label);
      }
      const double error = size * unit(F32) * double(8 + rows / 256) + std::fabs(want) * unit(type);
      expect_near("dweight", v * hidden + h, dweight[v * hidden + h], want, error);
    }
    double want = 1, size = 1;
    for (int64_t t = 0; t < rows; ++t) {
      const double term = gs[size_t(v * rows + t)] * scale[t], label = labels[t] - first == v ? values[t] : 0;
      want += term + label;
      size += std::fabs(term) + std::fabs(label);
    }
    if (with_bias) expect_near("dbias", v, dbias[v], want, size * unit(F32) * double(8 + rows / 8));
  }
}

void gradients(bool few) {
  uint64_t seed = 0;
  for (int64_t rows : {0, 1, 2, 3, 17, 65, 130}) {
    for (int64_t hidden : {1, 2, 31, 64, 66, 200}) {
      for (int64_t width : {0, 1, 2, 63, 65, 150}) {
        if (few && (hidden < 66 || width < 63)) continue;
        ++seed;
        grad_hidden(seed % 3 == 0   ? BF16
                    : seed % 3 == 1 ? F32
                                    : F16,
                    rows, hidden, width, int64_t(seed % 2 ? 1 + seed % 7 : 2), seed);
        grad_weight(rows, hidden, width, seed % 3 == 0, seed % 3 == 2 ? BF16 : F32, seed % 7 != 0, seed % 5 != 0, seed);
      }
    }
  }
  for (DType type : {BF16, F32}) grad_hidden(type, 5, 70, 1029, 4, ++seed);
  grad_weight(1031, 10, 6, true, F32, true, true, ++seed);
  grad_weight(1031, 10, 6, false, BF16, true, true, ++seed);
}

void row_kernels() {
  uint64_t seed = 0;
  for (DType type : kTypes) {
    const DType acc = accumulate_type(type);
    for (DType weight_type : kTypes) {
      for (int64_t hidden : {1, 2, 7, 31, 64, 1024, 1025, 2500}) {
        Random random(++seed);
        const int64_t rows = int64_t(seed % 5), vocab = 6, x_stride = hidden + seed % 3, w_stride = hidden + seed % 2;
        const Array x = matrix(type, rows, hidden, x_stride, random), w = matrix(weight_type, vocab, hidden, w_stride, random);
        const Array bias(acc, vocab, [&](int64_t) { return random.normal(); });
        const Labels labels(rows, [&](int64_t t) { return t ? random.below(vocab) : vocab - 1; });
        const bool match = seed % 2, with_bias = seed % 3;
        Array out(acc, rows);
        const IndexedDot dot{.x = x.data(),
                             .x_stride = x_stride,
                             .x_dtype = type,
                             .weight = w.data(),
                             .weight_stride = w_stride,
                             .weight_dtype = weight_type,
                             .bias = with_bias ? bias.data() : nullptr,
                             .bias_dtype = acc,
                             .labels = labels.data(),
                             .out = out.data(),
                             .tokens = rows,
                             .hidden = hidden,
                             .vocab = vocab,
                             .rounded = match};
        kernels().indexed_dot(dot, run_threads);
        for (int64_t t = 0; t < rows; ++t) {
          long double want = with_bias ? bias[labels[t]] : 0, size = std::fabs(want);
          for (int64_t h = 0; h < hidden; ++h) {
            const long double term = (long double)(x[t * x_stride + h]) * stored(w[labels[t] * w_stride + h], type);
            want += term;
            size += std::fabs(term);
          }
          expect_near("dot", t, out[t], double(want),
                      double(size) * unit(acc) * 32 + (match ? std::fabs(double(want)) * unit(type) : 0));
          if (match) expect_near("dot is rounded", t, out[t], stored(out[t], type), 0);
        }

        if (acc == F32 && weight_type != F64) {
          Array values = matrix(F32, rows, hidden, hidden, random);
          const Array before = values, scale(F32, rows, [&](int64_t) { return random.normal(); }),
                      target(F32, rows, [&](int64_t) { return random.normal(); });
          const FinishRows finish{.values = values.floats(),
                                  .scale = scale.floats(),
                                  .target = target.floats(),
                                  .weight = w.data(),
                                  .weight_stride = w_stride,
                                  .weight_dtype = weight_type,
                                  .labels = labels.data(),
                                  .tokens = rows,
                                  .hidden = hidden};
          kernels().finish_rows(finish, run_threads);
          for (int64_t i = 0; i < rows * hidden; ++i) {
            const int64_t t = i / hidden;
            const double a = before[i] * scale[t], b = target[t] * stored(w[labels[t] * w_stride + i % hidden], BF16);
            expect_near("finished", i, values[i], a + b, (std::fabs(a) + std::fabs(b)) * 2 * unit(F32));
          }
        }
        if (weight_type == F32) {
          const int64_t v_stride = hidden + seed % 3, out_stride = hidden + seed % 2, out_rows = rows + 2;
          const Array values = matrix(acc, rows, hidden, v_stride, random),
                      factor(acc, 5, [&](int64_t) { return random.normal(); });
          const Labels to(rows, [&](int64_t i) { return rows + 1 - i; });
          Array scattered(type, (out_rows - 1) * out_stride + hidden);
          const ScaleScatter scatter{.values = values.data(),
                                     .values_stride = v_stride,
                                     .values_dtype = acc,
                                     .rows = to.data(),
                                     .factor = factor.data(),
                                     .factor_stride = match ? 1 : 0,
                                     .out = scattered.data(),
                                     .out_stride = out_stride,
                                     .out_dtype = type,
                                     .tokens = rows,
                                     .hidden = hidden,
                                     .out_rows = out_rows};
          kernels().scale_scatter(scatter, run_threads);
          for (int64_t i = 0; i < rows * hidden; ++i) {
            const int64_t row = i / hidden, column = i % hidden;
            const double by = factor[match ? row : 0], value = values[row * v_stride + column];
            const double want = acc == F64 ? value * by : double(float(value) * float(by));
            expect_near("scattered", i, scattered[to[row] * out_stride + column], stored(want, type), 0);
          }
        }
      }
    }
    for (int64_t count : {0, 1, 3, 17, 65536, 65537, 200003}) {
      constexpr double special[] = {0,     -0.0,     INFINITY, -INFINITY, NAN,    1e-40, 65504,
                                    65520, -65519.9, 6e-8,     2e-8,      3.4e38, 1e-5,  6.1e-5};
      Random random(++seed);
      const Array source(acc, count, [&](int64_t i) { return i % 3 ? random.normal() : special[i / 3 % 14]; });
      const Array factor(acc, 1, [&](int64_t) { return seed % 2 ? 1 : 0.37; });
      Array out(type, count);
      const ScaledConvert convert{.source = source.data(),
                                  .source_dtype = acc,
                                  .factor = factor.data(),
                                  .out = out.data(),
                                  .out_dtype = type,
                                  .count = count};
      kernels().scaled_convert(convert, run_threads);
      for (int64_t i = 0; i < count; ++i) {
        const double want = acc == F64 ? source[i] * factor[0] : double(float(source[i]) * float(factor[0]));
        expect_near("converted", i, out[i], stored(want, type), 0);
      }
    }
  }
}

void finish_tile(DType type, int64_t rows, int64_t columns, int64_t width, bool with_factors, bool with_target, uint64_t seed) {
  Random random(seed);
  const int64_t stride = columns + seed % 3, blocks = (columns + width - 1) / width, factors_stride = rows + seed % 2;
  const DType acc = accumulate_type(type);
  Array tile = matrix(type, rows, columns, stride, random);
  const Array before = tile, at_target(acc, rows, [&](int64_t) { return random.normal(); });
  const Array factors(acc, blocks * factors_stride, [&](int64_t i) { return i % 2 ? 1 : random.normal(); });
  const Labels labels(rows, [&](int64_t) { return random.below(columns); });
  const FinishTile op{.tile = tile.data(),
                      .tile_stride = stride,
                      .tile_dtype = type,
                      .factors = with_factors ? factors.data() : nullptr,
                      .factors_stride = factors_stride,
                      .labels = labels.data(),
                      .at_target = with_target ? at_target.data() : nullptr,
                      .tokens = rows,
                      .columns = columns,
                      .width = width,
                      .blocks = blocks};
  kernels().finish_tile(op, run_threads);
  for (int64_t i = 0; i < tile.size(); ++i) {
    const int64_t row = i / stride, column = i % stride;
    const bool factor = with_factors && column < columns;
    const double by = factor ? factors[column / width * factors_stride + row] : 1;
    double want = acc == F64 ? before[i] * by : double(float(before[i]) * float(by));
    if (with_target && column == labels[row]) want = at_target[row];
    expect_near("finished tile", i, tile[i], stored(want, type), 0);
  }
}

void finish_tiles() {
  uint64_t seed = 0;
  for (DType type : kTypes) {
    for (int64_t rows : {0, 1, 5}) {
      for (int64_t columns : {1, 7, 64, 131}) {
        for (int64_t width : {1, 16, 50, 200}) {
          ++seed;
          finish_tile(type, rows, columns, width, seed % 4 != 3, seed % 3 != 2, seed);
        }
      }
    }
  }
}

// The table has no such entry: it is the same for every instruction set.
void pair_losses() {
  uint64_t seed = 0;
  for (DType type : {F32, F64}) {
    for (int64_t pairs : {0, 1, 9}) {
      for (int kind = 0; kind < kMarginFunctions; ++kind) {
        for (bool mean : {false, true}) {
          Random random(++seed);
          std::vector<int64_t> ends = {0};
          for (int64_t j = 0; j < 2 * pairs; ++j) ends.push_back(ends.back() + random.below(6));
          const Labels offsets(2 * pairs + 1, [&](int64_t j) { return ends[size_t(j)]; });
          const int64_t tokens = ends.back();
          const bool weighted = seed % 2, referenced = seed % 3;
          const Array weights(F64, tokens, [&](int64_t t) { return t % 4 ? random.normal() : 0; });
          const Array logps(type, tokens, [&](int64_t t) { return weighted && t % 8 == 0 ? NAN : random.normal(); });
          const Array ref(F64, 2 * pairs, [&](int64_t) { return random.normal(); });
          Array losses(F64, pairs), sequences(F64, 2 * pairs), coefficients(type, tokens);
          const PairLoss op{.logps = logps.data(),
                            .logps_dtype = type,
                            .weights = weighted ? weights.data() : nullptr,
                            .weights_dtype = F64,
                            .offsets = offsets.data(),
                            .ref_logps = referenced ? ref.doubles() : nullptr,
                            .loss = {.kind = kind, .beta = 0.3, .gamma = 0.1, .label_smoothing = 0.2},
                            .mean = mean,
                            .scale = 1.5,
                            .losses = losses.doubles(),
                            .sequence_logps = sequences.doubles(),
                            .coefficients = coefficients.data(),
                            .pairs = pairs};
          pair_loss(op, run_threads);
          for (int64_t j = 0; j < pairs; ++j) {
            double delta = 0;
            for (int64_t side = 2 * j; side < 2 * j + 2; ++side) {
              double sum = 0;
              for (int64_t t = offsets[side]; t < offsets[side + 1]; ++t) {
                if (!weighted || weights[t] != 0) sum += (weighted ? weights[t] : 1) * logps[t];
              }
              if (mean) sum /= double(std::max<int64_t>(1, offsets[side + 1] - offsets[side]));
              expect_near("sequence", side, sequences[side], sum, 1e-12);
              delta += (side % 2 ? -1 : 1) * (sum - (referenced ? ref[side] : 0));
            }
            const double h = 0.3 * delta - 0.1, hinge = std::max(0.0, 1 - 0.3 * delta), ipo = delta - 1 / 0.6;
            const double sigmoid = 0.8 * std::log(1 + std::exp(-h)) + 0.2 * std::log(1 + std::exp(h));
            const double s = 1 / (1 + std::exp(-h));
            const double loss[] = {sigmoid, hinge, ipo * ipo};
            const double slope[] = {0.3 * (s - 0.8), hinge > 0 ? -0.3 : 0, 2 * ipo};
            expect_near("loss", j, losses[j], loss[kind], 1e-12 * (1 + loss[kind]));
            for (int64_t t = offsets[2 * j]; t < offsets[2 * j + 2]; ++t) {
              const int64_t side = 2 * j + (t >= offsets[2 * j + 1]), length = offsets[side + 1] - offsets[side];
              const double want =
                  1.5 * slope[kind] * (side % 2 ? -1 : 1) * (weighted ? weights[t] : 1) / double(mean ? length : 1);
              expect_near("coefficient", t, coefficients[t], want, 1e-12 + std::fabs(want) * (1e-12 + unit(type)));
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace logitless::cpu::sanitized

#ifdef LOGITLESS_GENERIC_ONLY  // instead of csrc/cpu/dispatch.cpp
namespace logitless::cpu {
const Kernels& kernels() { return generic::table; }
}  // namespace logitless::cpu
#endif

int main(int argc, char** argv) {
  using namespace logitless::cpu::sanitized;
  const std::string argument = argc > 1 ? argv[1] : "";
  if (argument == "name") return std::puts(logitless::cpu::kernels().name) < 0;
  const bool few = argument == "few";
  tile_passes(few);
  score_blocks(few);
  not_numbers();
  gradients(few);
  row_kernels();
  finish_tiles();
  pair_losses();
  std::printf("%s: %d comparisons, %d failures\n", logitless::cpu::kernels().name, comparisons.load(), failures.load());
  return failures != 0;
}
