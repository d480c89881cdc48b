// dX and dW from the gradient that score_block wrote, by small GEMMs that accumulate in float32.
#pragma once

#include <cstdint>
#include <utility>

#include "logitless/cpu/buffer.h"
#include "logitless/cpu/isa.h"
#include "logitless/cpu/ops.h"
#include "logitless/cpu/pack.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

constexpr int64_t kSlice = 512;        // vocabulary entries of one small GEMM of dX
constexpr int64_t kMaxColumns = 1024;  // most hidden elements of a task of dX; bounds its memory

// One step of the transposition of kLanes vectors of kLanes words: swaps blocks of D off the diagonal.
template <int D, int... Lane>
LOGITLESS_INLINE void swap_blocks(Word* rows, std::integer_sequence<int, Lane...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const Word a = rows[i], b = rows[i + D];
    rows[i] = __builtin_shufflevector(a, b, ((Lane & D) ? Lane - D + kLanes : Lane)...);
    rows[i + D] = __builtin_shufflevector(a, b, ((Lane & D) ? Lane + kLanes : Lane + D)...);
  }
}

// out (tokens, ld) = gradient (count, tokens)^T, by pairs of entries as words; columns count..ld are zero, ld is even.
inline void transpose(const uint16_t* gradient, int64_t stride, int64_t count, int64_t tokens, int64_t ld, uint16_t* out) {
  const auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int64_t v = 0; v < ld; v += 2 * kLanes) {
    const int64_t width = least(2 * kLanes, ld - v);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const int64_t some = least(kLanes, tokens - t);
      Word rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        Half pair[2] = {};
        for (int64_t j = 0; j < 2; ++j) {
          if (v + 2 * i + j >= count) continue;
          const uint16_t* from = gradient + (v + 2 * i + j) * stride + t;
          if (some == kLanes) {
            pair[j] = load_bits<Half>(from);
          } else {
            __builtin_memcpy(&pair[j], from, some * 2);
          }
        }
        rows[i] = __builtin_convertvector(pair[0], Word) | (__builtin_convertvector(pair[1], Word) << 16);
      }
      if constexpr (kLanes > 8) swap_blocks<8>(rows, lanes);
      if constexpr (kLanes > 4) swap_blocks<4>(rows, lanes);
      swap_blocks<2>(rows, lanes);
      swap_blocks<1>(rows, lanes);
      for (int64_t j = 0; j < some; ++j) {
        uint16_t* to = out + (t + j) * ld + v;
        if (width == 2 * kLanes) {
          store_bits(to, rows[j]);
        } else {
          __builtin_memcpy(to, &rows[j], width * 2);
        }
      }
    }
  }
}

// Tokens and hidden elements of each task of dX: as near to a square as the threads allow, since each task transposes its
// tokens' gradient and interleaves its part of the weight.
struct Grid {
  int64_t token_step, hidden_step, across;  // tasks: ceil(rows / token_step) * across

  Grid(int64_t rows, int64_t hidden, int64_t threads) {
    int64_t best_cost = -1;
    for (int64_t a = 1; a <= threads; ++a) {
      const int64_t b = (threads + a - 1) / a;
      const int64_t token_part = round_up((rows + a - 1) / a, kTokenBlock),
                    hidden_part = least(kMaxColumns, round_up((hidden + b - 1) / b, kHiddenBlock));
      const int64_t tasks = ((rows + token_part - 1) / token_part) * ((hidden + hidden_part - 1) / hidden_part);
      const int64_t rounds = (tasks + threads - 1) / threads;
      const int64_t tokens = least(token_part, rows), columns = least(hidden_part, hidden);
      const int64_t cost = rounds * (tokens * columns + 16 * (tokens + columns));
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        token_step = token_part;
        hidden_step = hidden_part;
        across = (hidden + hidden_part - 1) / hidden_part;
      }
    }
  }
};

inline void grad_hidden(const GradHidden& p, ParallelFor run, SmallGemm gemm, ReleaseGemm release) {
  if (p.tokens == 0 || p.width == 0) return;
  const Grid grid(p.tokens, p.hidden, p.threads);
  parallel(run, (p.tokens + grid.token_step - 1) / grid.token_step * grid.across, [&](int64_t task) {
    const int64_t t0 = task / grid.across * grid.token_step, h0 = task % grid.across * grid.hidden_step;
    const int64_t tokens = least(grid.token_step, p.tokens - t0), columns = least(grid.hidden_step, p.hidden - h0);
    const bool direct = p.weight_dtype == DType::kBFloat16;
    Buffer<uint16_t> b(kSlice * round_up(columns, kHiddenBlock)), a(kTokenBlock * kSlice), rows(direct ? 0 : kSlice * columns);
    for (int64_t v = 0; v < p.width; v += kSlice) {
      const int64_t depth = least(kSlice, p.width - v), even = round_up(depth, 2);
      const uint16_t* w = static_cast<const uint16_t*>(p.weight) + v * p.weight_stride + h0;
      if (!direct) {
        for (int64_t i = 0; i < depth; ++i) {
          to_bf16(p.weight, p.weight_dtype, (v + i) * p.weight_stride + h0, columns, rows.data() + i * columns);
        }
        w = rows.data();
      }
      for (int64_t h = 0; h < columns; h += kHiddenBlock) {
        interleave(w + h, direct ? p.weight_stride : columns, depth, least(kHiddenBlock, columns - h), kHiddenBlock,
                   b.data() + h * kSlice);
      }
      for (int64_t t = 0; t < tokens; t += kTokenBlock) {
        const int64_t some = least(kTokenBlock, tokens - t);
        transpose(p.gradient + v * p.tokens + t0 + t, p.tokens, depth, some, even, a.data());
        for (int64_t h = 0; h < columns; h += kHiddenBlock) {
          gemm(some, least(kHiddenBlock, columns - h), even, even, kHiddenBlock, p.hidden, true, a.data(),
               b.data() + h * kSlice, p.dhidden + (t0 + t) * p.hidden + h0 + h);
        }
      }
    }
    release();
  });
}

LOGITLESS_INLINE void add_scaled(const uint16_t* x, float scale, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = int(least(kLanes, count - i));
    const Vec<float> v = load_some<float>(reinterpret_cast<const bfloat16*>(x + i), some) * scale;
    store_some<float>(to + i, load_some<float>(to + i, some) + v, some);
  }
}

// The tokens of each label of a block of the vocabulary, in order.
class ByLabel {
 public:
  ByLabel(const int64_t* labels, int64_t rows, int64_t first, int64_t width) : starts_(width + 2), tokens_(rows) {
    for (int64_t t = 0; t < rows; ++t) {
      if (inside(labels[t] - first, width)) ++starts_[labels[t] - first + 2];
    }
    for (int64_t v = 2; v < width + 2; ++v) starts_[v] += starts_[v - 1];
    for (int64_t t = 0; t < rows; ++t) {
      if (inside(labels[t] - first, width)) tokens_[starts_[labels[t] - first + 1]++] = t;
    }
  }

  // Calls f(row, token) for rows v0..v1.
  template <class F>
  void each(int64_t v0, int64_t v1, F&& f) {
    for (int64_t v = v0; v < v1; ++v) {
      for (int64_t i = starts_[v]; i < starts_[v + 1]; ++i) f(v, tokens_[i]);
    }
  }

 private:
  static bool inside(int64_t v, int64_t width) { return v >= 0 && v < width; }
  Buffer<int64_t> starts_, tokens_;
};

inline float dot_with(const uint16_t* g, const float* scale, int64_t count) {
  Vec<float> total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = int(least(kLanes, count - i));
    total += load_some<float>(reinterpret_cast<const bfloat16*>(g + i), some) * load_some<float>(scale + i, some);
  }
  return sum_lanes<float>(total);
}

inline void grad_weight(const GradWeight& p, ParallelFor run, SmallGemm gemm, ReleaseGemm release) {
  const int64_t even = round_up(p.tokens, 2);
  ByLabel by_label(p.labels, p.tokens, p.first, p.width);
  parallel(run, (p.width + kUnitRows - 1) / kUnitRows, [&](int64_t task) {
    const int64_t v = task * kUnitRows, height = least(kUnitRows, p.width - v);
    const uint16_t* a = p.gradient + v * p.tokens;
    if (p.dbias) {
      for (int64_t i = 0; i < height; ++i) p.dbias[v + i] += dot_with(a + i * p.tokens, p.scale, p.tokens);
      by_label.each(v, v + height, [&](int64_t row, int64_t t) { p.dbias[row] += p.values[t]; });
    }
    if (!p.dweight) return;
    // The GEMM reads pairs: the ends of odd rows are copied and padded with a zero.
    const int64_t last = even == p.tokens ? even : (even - 1) / kDepth * kDepth;
    Buffer<uint16_t> padded(height * (even - last));
    for (int64_t i = 0; i < height && last < even; ++i) {
      __builtin_memcpy(padded.data() + i * (even - last), a + i * p.tokens + last, (p.tokens - last) * 2);
    }
    alignas(64) float scratch[kUnitRows * kHiddenBlock];
    for (int64_t h = 0; h < p.hidden; h += kHiddenBlock) {
      const int64_t columns = least(kHiddenBlock, p.hidden - h);
      float* c = p.accumulate ? static_cast<float*>(p.dweight) + v * p.hidden + h : scratch;
      const int64_t ldc = p.accumulate ? p.hidden : kHiddenBlock;
      if (even == 0) {
        if (!p.accumulate) __builtin_memset(scratch, 0, sizeof(scratch));
      }
      for (int64_t t = 0; t < even; t += kDepth) {
        const bool odd = t == last;
        gemm(height, columns, least(kDepth, even - t), odd ? even - last : p.tokens, kHiddenBlock, ldc, p.accumulate || t > 0,
             odd ? padded.data() : a + t, p.packed + h * even + t * kHiddenBlock, c);
      }
      by_label.each(v, v + height, [&](int64_t row, int64_t t) {
        add_scaled(p.x + t * p.x_stride + h, p.values[t], columns, c + (row - v) * ldc);
      });
      if (!p.accumulate) {
        for (int64_t i = 0; i < height; ++i) {
          with_type<float>(p.dweight, p.dweight_dtype, (v + i) * p.hidden + h,
                           [&](auto* row) { narrow<float>(scratch + i * kHiddenBlock, row, columns); });
        }
      }
    }
    release();
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
