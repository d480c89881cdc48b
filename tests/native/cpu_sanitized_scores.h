// Logits to sums and gradient, against double precision: tile_pass and score_block.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu_sanitized.h"

namespace logitless::cpu::sanitized {

constexpr DType kTypes[] = {F32, F64, BF16, F16};
constexpr HeadSpec kHeads[] = {{1, 0, 1}, {0.3, 0, 0.7}, {-2, 5, 1.3}};

// The reference for one row of logits.
struct Row {
  std::vector<double> z, slope, inside;  // `inside` the tanh, or 0
  double k, largest = 0;
  int64_t label;  // column, may be outside
  bool capped;

  Row(const std::vector<double>& raw, int64_t label_, double k_, const HeadSpec& h)
      : k(k_), label(label_), capped(h.softcap > 0) {
    for (double r : raw) {
      const double x = capped ? r * h.logit_scale / h.softcap : 0;
      inside.push_back(std::isfinite(x) ? std::fabs(x) : 0);
      z.push_back(capped ? std::tanh(x) * h.softcap / h.temperature : r * h.logit_scale / h.temperature);
      slope.push_back(capped ? 1 / (std::cosh(x) * std::cosh(x)) : 1);
      if (std::isfinite(z.back())) largest = std::max(largest, std::fabs(z.back()));
    }
  }

  int64_t width() const { return int64_t(z.size()); }
  double d(int64_t i) const { return std::max(z[size_t(i)] - k, kFloor); }
  double e(int64_t i) const { return i == label ? 0 : std::exp(z[size_t(i)] - k); }
  // What float arithmetic may lose of e, relative: exp(z - k) is as good as z and k are.
  double reach(DType acc) const { return unit(acc) * (32 + 4 * (largest + std::fabs(k))); }

  // The sums that `outputs` asks for, `gemm`: the error of the logits themselves.
  void compare_sums(const Array& sums, int64_t row, int64_t stride, int outputs, DType acc, double gemm) const {
    long double want[kNumSums] = {0, 0, 0, 0, -INFINITY, -INFINITY, -INFINITY}, size[kNumSums] = {};
    for (int64_t i = 0; i < width(); ++i) {
      const long double x = e(i), by = d(i), logit = z[size_t(i)];
      want[kSumE] += x;
      size[kSumE] += x;
      want[kSumEz] += x * by;
      size[kSumEz] += x * (std::fabs(by) + 1);
      want[kSumEe] += x * x;
      size[kSumEe] += 2 * x * x;
      want[kSumZ] += logit;
      size[kSumZ] += std::fabs(logit);
      const int place = i == label ? kSumTarget : i < label ? kSumBefore : kSumAfter;
      want[place] = std::max(want[place], logit);
      size[place] = largest;
    }
    const bool asked[kNumSums] = {true,
                                  (outputs & kWantEz) != 0,
                                  (outputs & kWantEe) != 0,
                                  (outputs & kWantZ) != 0,
                                  (outputs & kWantTop) != 0,
                                  (outputs & kWantTop) != 0,
                                  (outputs & kWantTop) != 0};
    const char* names[kNumSums] = {"e", "ez", "ee", "z", "target", "before", "after"};
    for (int s = 0; s < kNumSums; ++s) {
      const double got = sums[s * stride + row];
      if (!asked[s]) {
        expect_near(names[s], row, got, s < kSumTarget ? 0 : -INFINITY, 0);
      } else {
        const double floor = smallest(acc) * double(width() + 1);  // exp ends where numbers are normal
        expect_near(names[s], row, got, double(want[s]), double(size[s]) * (reach(acc) + gemm) + floor);
      }
    }
  }

  // An entry of the gradient, held in type `out`.
  void compare_entry(double got, int64_t i, DType out, DType acc, double factor, double size, double roundings,
                     double gemm) const {
    const double x = e(i), want = x * slope[size_t(i)] * factor;
    double error =
        x * slope[size_t(i)] * size * (unit(out) * roundings + reach(acc) + gemm + 8 * unit(acc) * inside[size_t(i)]);
    error += smallest(out) + 4 * smallest(acc) * (1 + x) * size;  // exp, and with it 1 - tanh^2, ends where numbers are normal
    if (roundings > 1) error += acc == F64 ? 0 : 1e-31;           // a factor that is not a normal number, times at most exp(30)
    if (std::fabs(want) * 1.01 > largest_of(out) && std::isinf(got)) return;
    expect_near("gradient", i, got, want, error);
  }

  static double largest_of(DType t) { return sanitized::largest(t); }
};

inline Array new_sums(int64_t stride) {
  return Array(F64, kNumSums * stride, [&](int64_t i) { return i < kSumTarget * stride ? 0.0 : -INFINITY; });
}

enum class Into { Nothing, Other, SameMemory };

// Two blocks of columns, one after the other, with sums or (final) without.
inline void tile_pass(DType type, Into into, DType out, int64_t rows, int64_t width, const HeadSpec& head, int outputs,
                      Rounding rounding, bool with_bias, double peak, bool final, uint64_t seed) {
  Random random(seed);
  const DType acc = accumulate_type(type);
  const int64_t first = 3, gap = into == Into::SameMemory ? 0 : seed % 3, stride = width + gap;
  const int64_t elements = rows ? (rows - 1) * stride + width : 0, ratio = size_of(type) / size_of(out);
  Array source(type, elements, [&](int64_t i) {
    const int64_t row = i / stride, column = i % stride;
    double x = 2 * random.normal();
    for (int part = 1; part < 4 && row % 2 == 0; ++part) x += column == width * part / 4 ? peak * part : 0;
    return head.logit_scale < 0 ? -x : x;
  });
  const Array original = source;
  const Array bias(acc, first + width, [&](int64_t i) { return i == first + 5 ? -INFINITY : random.normal(); });
  const Labels labels(rows, [&](int64_t i) { return i == 1 ? -100 : first - 2 + random.below(width + 4); });
  Array k(acc, rows, [&](int64_t) { return random.normal() + (final ? 3 : 0); });
  const int64_t sums_stride = rows + seed % 2, mix_stride = rows + seed % 3;
  const Array start = k, mix(acc, 2 * mix_stride, [&](int64_t) { return random.normal(); });
  const Array at_target(acc, rows, [&](int64_t) { return random.normal(); });
  Array destination(out, into == Into::Other ? elements : 0), sums = new_sums(sums_stride);
  const Array inverse(acc, rows, [&](int64_t) { return 0.25 * (1 + random.below(4)); });
  const bool tempered = seed % 4 == 1;
  const auto head_of = [&](int64_t row) {
    return tempered ? HeadSpec{head.logit_scale, head.softcap, head.temperature / inverse[row]} : head;
  };

  TilePass p{};
  p.source_dtype = type;
  p.source_stride = stride;
  p.destination_dtype = out;
  p.destination_stride = into == Into::Other ? stride : stride * ratio;
  p.bias_dtype = acc;
  p.labels = labels.data();
  p.k = k.data();
  p.sums = final ? nullptr : sums.doubles();
  p.sums_stride = sums_stride;
  p.mix = final && seed % 2 ? mix.data() : nullptr;
  p.mix_stride = mix_stride;
  p.at_target = final || seed % 2 ? at_target.data() : nullptr;
  p.inverse_temperature = tempered ? inverse.data() : nullptr;
  p.tokens = rows;
  p.outputs = outputs;
  p.rounding = rounding;
  p.head = head;
  // a 16-bit row that starts where a 32-bit one does would cover the next block of its columns: one block there
  const int64_t cut = into == Into::SameMemory && ratio != 1 ? 0 : width / 2;
  const auto raw = [&](int64_t row, int64_t c0, int64_t c1) {
    std::vector<double> values;
    for (int64_t c = c0; c < c1; ++c) {
      double x = original[row * stride + c];
      if (with_bias) x = acc == F64 ? x + bias[first + c] : double(float(x) + float(bias[first + c]));
      values.push_back(rounding == Rounding::kNone ? x : stored(x, rounding == Rounding::kBFloat16 ? BF16 : F16));
    }
    return values;
  };
  for (const auto& [c0, c1] : {std::pair{int64_t(0), cut}, {cut, width}}) {
    const auto offset = [&, begin = c0](const Array& a) {
      return a.size() ? static_cast<char*>(a.data()) + begin * size_of(a.type()) : nullptr;
    };
    const Array before = k;
    p.source = offset(source);
    p.bias = with_bias ? static_cast<char*>(bias.data()) + (first + c0) * size_of(acc) : nullptr;
    p.destination = into == Into::Nothing ? nullptr : offset(into == Into::Other ? destination : source);
    p.width = c1 - c0;
    p.first = first + c0;
    kernels().tile_pass(p, run_threads);
    if (into == Into::Nothing) continue;
    for (int64_t row = 0; row < rows; ++row) {
      const Row reference(raw(row, c0, c1), labels[row] - first - c0, k[row], head_of(row));
      const Row written(raw(row, c0, c1), labels[row] - first - c0, before[row], head_of(row));
      for (int64_t i = 0; i < c1 - c0; ++i) {
        double got;
        if (into == Into::Other) {
          got = destination[row * stride + c0 + i];
        } else if (ratio == 1) {
          got = source[row * stride + c0 + i];
        } else {
          uint16_t bits;
          std::memcpy(&bits, static_cast<char*>(source.data()) + row * stride * 4 + i * 2, 2);
          got = decode(bits, out == BF16 ? kBF16 : kFP16);
        }
        if (i == reference.label) {
          expect_near("target", i, got, p.at_target ? stored(at_target[row], out) : 0, 0);
          continue;
        }
        // a half-precision entry was written as infinity, and stays that, where k is raised later
        if (out == F16 && k[row] != before[row] && written.e(i) > 65000) continue;
        const double m0 = p.mix ? mix[row] : 1, m1 = p.mix ? mix[mix_stride + row] : 0;
        reference.compare_entry(got, i, out, acc, m0 + m1 * reference.d(i),
                                std::fabs(m0) + std::fabs(m1) * (1 + std::fabs(reference.d(i))), k[row] == before[row] ? 1 : 3,
                                0);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    expect(final ? k[row] == start[row] : k[row] >= start[row], "k is raised or kept");
    if (!final)
      Row(raw(row, 0, width), labels[row] - first, k[row], head_of(row)).compare_sums(sums, row, sums_stride, outputs, acc, 0);
  }
}

inline void tile_passes(bool few) {
  constexpr int asked[] = {15, 0, kWantEz, kWantZ, kWantTop, kWantEe};
  uint64_t seed = 0;
  for (DType type : kTypes) {
    if (few && type != F32) continue;
    std::vector<std::pair<Into, DType>> destinations = {{Into::Nothing, type}, {Into::Other, type}, {Into::SameMemory, type}};
    if (type == F32) {
      for (DType half : {BF16, F16}) destinations.insert(destinations.end(), {{Into::Other, half}, {Into::SameMemory, half}});
    }
    for (auto [into, out] : destinations) {
      for (const HeadSpec& head : kHeads) {
        for (int64_t width : {0, 1, 2, 7, 33, 1025, 3100}) {
          for (double peak : {0.0, 20.0, 90.0}) {
            if (few && (width > 33 ? head.softcap > 0 : peak > 0)) continue;
            ++seed;
            const Rounding rounding = type == F64 || seed % 2 ? Rounding::kNone
                                      : type == F16           ? Rounding::kFloat16
                                                              : Rounding::kBFloat16;
            tile_pass(type, into, out, width > 33 ? 3 : int64_t(seed % 5), width, head, asked[seed % 6], rounding,
                      seed % 3 == 0, peak, false, seed);
            if (into != Into::Nothing && peak == 0) {
              tile_pass(type, into, out, int64_t(seed % 4), width, head, 0, rounding, seed % 3 == 0, 0, true, seed);
            }
          }
        }
      }
    }
  }
  tile_pass(F32, Into::Other, F32, 2000, 70, kHeads[0], 15, Rounding::kNone, false, 90, false, 3);  // more tasks than threads
}

struct Score {
  Array sums, k, gradient;
};

inline void score_block(DType weight_type, int64_t rows, int64_t hidden, int64_t width, const HeadSpec& head, int outputs,
                        Rounding rounding, bool with_bias, double peak, bool final, uint64_t seed) {
  Random random(seed);
  const int64_t first = 5, x_stride = hidden + seed % 3, w_stride = hidden + seed % 2;
  Array x = matrix(BF16, rows, hidden, x_stride, random),
        w = matrix(weight_type, width, hidden, w_stride, random, 1 / std::sqrt(double(hidden)));
  for (int64_t t = 0; t < rows; ++t) x.set(t * x_stride, peak && t % 3 == 0 ? 1 : 0);
  for (int part = 1; part < 4; ++part) w.set(width * part / 4 * w_stride, (head.logit_scale < 0 ? -peak : peak) * part);
  const Array bias(F32, first + width, [&](int64_t i) { return i == first + 7 ? -INFINITY : random.normal(); });
  const Labels labels(rows, [&](int64_t t) { return t == 1 ? -100 : first - 2 + random.below(width + 4); });
  const Array start(F32, rows, [&](int64_t) { return random.normal() + (final ? 4 + 3 * peak : 0); });
  const Array mix(F32, 2 * rows, [&](int64_t) { return random.normal(); });
  const Array inverse(F32, rows, [&](int64_t) { return 0.25 * (1 + random.below(4)); });
  const bool tempered = seed % 3 == 1;

  Array packed(BF16, packed_tokens_size(rows, hidden));
  kernels().pack_tokens(
      {.x = x.bf16(), .x_stride = x_stride, .scale = nullptr, .out = packed.bf16(), .tokens = rows, .hidden = hidden},
      run_threads);
  for (int64_t t = 0; t < round_up(rows, kTokenPad); ++t) {
    const int64_t block = t / kTokenBlock * kTokenBlock, across = round_up(std::min(kTokenBlock, rows - block), kTokenPad);
    for (int64_t h = 0; h < hidden; ++h) {
      const int64_t at = block * hidden + h / 2 * across * 2 + (t - block) * 2 + h % 2;
      expect_near("packed token", at, packed[at], t < rows ? x[t * x_stride + h] : 0, 0);
    }
  }

  const auto run = [&](const std::vector<int64_t>& cuts, bool with_gradient, ParallelFor how) {
    Score out{new_sums(rows), start, Array(BF16, with_gradient ? width * rows : 0)};
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      ScoreBlock p{};
      p.packed = packed.bf16();
      p.weight = static_cast<char*>(w.data()) + cuts[i] * w_stride * size_of(weight_type);
      p.weight_stride = w_stride;
      p.weight_dtype = weight_type;
      p.bias = with_bias ? bias.floats() + first + cuts[i] : nullptr;
      p.labels = labels.data();
      p.start = final ? nullptr : start.floats();
      p.k = out.k.floats();
      p.sums = final ? nullptr : out.sums.doubles();
      p.mix = final && seed % 2 ? mix.floats() : nullptr;
      p.inverse_temperature = tempered ? inverse.floats() : nullptr;
      p.gradient = with_gradient ? out.gradient.bf16() : nullptr;
      p.tokens = rows;
      p.hidden = hidden;
      p.width = cuts[i + 1] - cuts[i];
      p.first = first + cuts[i];
      p.outputs = outputs;
      p.rounding = rounding;
      p.head = head;
      kernels().score_block(p, how, small_gemm, release_gemm);
    }
    return out;
  };
  const Score got = run({0, width}, true, run_threads), serial = run({0, width}, true, run_serial);
  expect(got.sums.same_bits(serial.sums) && got.k.same_bits(serial.k) && got.gradient.same_bits(serial.gradient),
         "score_block does not depend on threads");
  if (!final) {
    std::vector<int64_t> cuts = {0};
    while (cuts.back() + 768 < width) cuts.push_back(cuts.back() + 256 * (cuts.size() % 2 ? 3 : 20));
    cuts.back() < width ? cuts.push_back(width) : void(cuts.back() = width);
    const Score blocks = run(cuts, false, run_threads);
    expect(got.sums.same_bits(blocks.sums) && got.k.same_bits(blocks.k), "score_block does not depend on blocks");
  }

  const std::vector<double> xs = seen(x, BF16), ws = seen(w, BF16);
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<double> raw;
    double size = 0;  // of the terms of the dot product
    for (int64_t v = 0; v < width; ++v) {
      double dot = 0, terms = 0;
      for (int64_t h = 0; h < hidden; ++h) {
        const double term = xs[size_t(t * x_stride + h)] * ws[size_t(v * w_stride + h)];
        dot += term;
        terms += std::fabs(term);
      }
      size = std::max(size, terms);
      dot = float(dot);
      if (with_bias) dot = float(dot) + float(bias[first + v]);
      raw.push_back(rounding == Rounding::kNone ? dot : stored(dot, rounding == Rounding::kBFloat16 ? BF16 : F16));
    }
    const HeadSpec own{head.logit_scale, head.softcap, tempered ? head.temperature / inverse[t] : head.temperature};
    const Row reference(raw, labels[t] - first, got.k[t], own);
    const double gemm = hidden > 1024 ? 4 * unit(F32) * size * std::fabs(head.logit_scale) : 0;  // added up in several parts
    expect(final ? got.k[t] == start[t] : got.k[t] >= start[t], "k is raised or kept");
    if (!final) reference.compare_sums(got.sums, t, rows, outputs, F32, gemm);
    for (int64_t v = 0; v < width; ++v) {
      if (v == reference.label) {
        expect_near("gradient at the label", v, got.gradient[v * rows + t], 0, 0);
        continue;
      }
      const double m0 = final && seed % 2 ? mix[t] : 1, m1 = final && seed % 2 ? mix[rows + t] : 0, d = reference.d(v);
      reference.compare_entry(got.gradient[v * rows + t], v, BF16, F32, m0 + m1 * d,
                              std::fabs(m0) + std::fabs(m1) * (1 + std::fabs(d)), got.k[t] == start[t] ? 1 : 4, gemm);
    }
  }
}

inline void score_blocks(bool few) {
  uint64_t seed = 0;
  for (DType weight_type : {BF16, F32, F16}) {
    for (const HeadSpec& head : kHeads) {
      for (int64_t rows : {0, 1, 17, 64, 67}) {
        for (int64_t width : {1, 63, 65, 300, 700}) {
          if (few && (rows == 64 || width < 300)) continue;
          ++seed;
          const int64_t hidden = seed % 4 == 0 ? 2 : seed % 4 == 1 ? 34 : seed % 4 == 2 ? 6 : 66;
          const int outputs = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 15 : 1 << seed % 4;
          const Rounding rounding = seed % 5 == 4 ? Rounding::kBFloat16 : Rounding::kNone;
          score_block(weight_type, rows, hidden, width, head, outputs, rounding, seed % 4 == 2, seed % 2 ? 0 : 40, false, seed);
          score_block(weight_type, rows, hidden, width, head, 0, rounding, seed % 4 == 2, seed % 2 ? 0 : 40, true, seed);
        }
      }
    }
  }
  // more than one round of spans, k raised in several; several parts of a long hidden
  for (const HeadSpec& head : {kHeads[0], kHeads[1]}) {
    for (int outputs : {0, 15}) {
      if (few && outputs) continue;
      score_block(BF16, 4, 6, few ? 16500 : 33100, head, outputs, Rounding::kNone, false, 40, false, ++seed);
    }
  }
  score_block(F32, 3, 2, 16400, kHeads[0], 15, Rounding::kNone, true, 90, false, ++seed);
  score_block(BF16, 3, 2050, 70, kHeads[0], 15, Rounding::kNone, false, 40, false, ++seed);
  score_block(F16, 2, 1026, 66, kHeads[2], 0, Rounding::kNone, true, 0, false, ++seed);
}

// What is not a number stays in its own row, and ends.
inline void not_numbers() {
  const Labels labels(3, [](int64_t i) { return i; });
  const Array source(F32, 3 * 2500, [](int64_t i) { return i == 7 ? NAN : i == 2 * 2500 - 1 ? INFINITY : 0.25; });
  Array k(F32, 3, [](int64_t) { return 0.0; }), sums = new_sums(3), out(F32, 3 * 2500);
  TilePass tile{};
  tile.source = source.data();
  tile.source_stride = 2500;
  tile.source_dtype = F32;
  tile.destination = out.data();
  tile.destination_stride = 2500;
  tile.destination_dtype = F32;
  tile.labels = labels.data();
  tile.k = k.data();
  tile.sums = sums.doubles();
  tile.sums_stride = 3;
  tile.head = kHeads[0];
  tile.tokens = 3;
  tile.width = 2500;
  tile.outputs = 15;
  kernels().tile_pass(tile, run_threads);
  expect(std::isnan(sums[0]) && std::isnan(sums[1]) && std::isfinite(sums[2]),
         "tile_pass keeps NaN and infinity in their rows");

  const Array x(BF16, 3 * 2, [](int64_t i) { return i == 0 ? NAN : 0.5; }), w(BF16, 300 * 2, [](int64_t) { return 0.5; });
  Array packed(BF16, packed_tokens_size(3, 2)), gradient(BF16, 900), start(F32, 3, [](int64_t) { return 0.0; }),
      raised = start, totals = new_sums(3);
  kernels().pack_tokens({.x = x.bf16(), .x_stride = 2, .scale = nullptr, .out = packed.bf16(), .tokens = 3, .hidden = 2},
                        run_threads);
  ScoreBlock score{};
  score.packed = packed.bf16();
  score.weight = w.data();
  score.weight_stride = 2;
  score.weight_dtype = BF16;
  score.labels = labels.data();
  score.start = start.floats();
  score.k = raised.floats();
  score.sums = totals.doubles();
  score.gradient = gradient.bf16();
  score.head = kHeads[0];
  score.tokens = 3;
  score.hidden = 2;
  score.width = 300;
  kernels().score_block(score, run_threads, small_gemm, release_gemm);
  expect(std::isnan(totals[0]) && std::isfinite(totals[1]) && std::isfinite(totals[2]), "score_block keeps NaN in its token");
}

}  // namespace logitless::cpu::sanitized
