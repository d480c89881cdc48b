// Logits by small GEMMs into the cache, and exponentials there. Rows are vocabulary entries and lanes are tokens, so sums need
// no horizontal step and the gradient has the layout that the dW GEMM reads.
#pragma once

#include <cstdint>

#include "logitless/cpu/buffer.h"
#include "logitless/cpu/head.h"
#include "logitless/cpu/isa.h"
#include "logitless/cpu/ops.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

// Vocabulary entries whose sums are kept together in float32: the unit of parallel work. The size is fixed and spans are added
// up in order, in float64, so a sum has the same bits for any number of threads and any blocks that are multiples of it.
constexpr int64_t kSpanRows = 256;
constexpr int64_t kSpans = 64;  // spans at a time; bounds the memory per token

// A token's k was raised: the value from a vocabulary row of the span on.
struct Raise {
  int64_t row, token;
  float k;
};

class RaiseList {
 public:
  ~RaiseList() { __builtin_free(items_); }
  void add(Raise r) {
    if (size_ == capacity_) {
      capacity_ = capacity_ ? 2 * capacity_ : 16;
      items_ = static_cast<Raise*>(__builtin_realloc(items_, capacity_ * sizeof(Raise)));
      if (!items_) __builtin_abort();
    }
    items_[size_++] = r;
  }
  const Raise* begin() const { return items_; }
  const Raise* end() const { return items_ + size_; }
  bool empty() const { return size_ == 0; }

 private:
  Raise* items_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

// Multiplies the tokens (columns) of a gradient (count, rows) by their factors (rows, padded), those of 1 untouched.
inline void rescale_columns(uint16_t* gradient, int64_t count, int64_t rows, const float* factor) {
  for (int64_t t = 0; t < rows; t += kLanes) {
    const int some = int(rows - t < kLanes ? rows - t : kLanes);
    const Vec<float> f = load_some<float>(factor + t, some);
    bool needed = false;
    for (int i = 0; i < some; ++i) needed |= f[i] != 1.0f;
    if (!needed) continue;
    for (int64_t i = 0; i < count; ++i) {
      bfloat16* g = reinterpret_cast<bfloat16*>(gradient + i * rows + t);
      store_some<float>(g, load_some<float>(g, some) * f, some);
    }
  }
}

class Scorer {
 public:
  Scorer(const ScoreBlock& p, SmallGemm gemm)
      : p_(p),
        gemm_(gemm),
        head_(p.head),
        general_(head_.capped || p.bias || p.rounding != Rounding::kNone || p.mix || p.outputs),
        sloped_(head_.capped && !(p.outputs & kWithoutSlope)),
        padded_(round_up(p.tokens, kTokenPad)),
        spans_((p.width + kSpanRows - 1) / kSpanRows),
        kept_(p.outputs ? kNumSums : 1),
        k_(padded_),
        labels_(padded_),
        factors_(p.inverse_temperature ? padded_ : 0),
        sums_(p.sums ? spans_ * kept_ * padded_ : 0),
        raises_(spans_) {
    for (int64_t t = 0; t < padded_; ++t) {
      // exponentials of padding tokens are 0
      k_[t] = t >= p.tokens ? 1e30f : p.sums ? p.start[t] : p.k[t];
      if (p.inverse_temperature) factors_[t] = t < p.tokens ? p.inverse_temperature[t] : 1;
      labels_[t] = t < p.tokens && p.labels[t] >= p.first && p.labels[t] < p.first + p.width ? int32_t(p.labels[t] - p.first)
                   : t < p.tokens && p.labels[t] < p.first                                   ? -1
                                                                                             : int32_t(p.width);
    }
  }

  int64_t spans() const { return spans_; }

  void span(int64_t s) {
    Buffer<float> k(p_.sums ? padded_ : 0);  // of this span: it may be raised
    if (p_.sums) __builtin_memcpy(k.data(), k_.data(), padded_ * sizeof(float));
    if (p_.sums && (p_.outputs & kWantTop)) {
      for (int sum = kSumTarget; sum < kNumSums; ++sum) {
        for (int64_t t = 0; t < padded_; ++t) sum_row(s, sum)[t] = -__builtin_inff();
      }
    }
    const int64_t end = least((s + 1) * kSpanRows, p_.width);
    const bool direct = p_.weight_dtype == DType::kBFloat16;
    Buffer<uint16_t> rounded_rows(direct ? 0 : kUnitRows * p_.hidden);
    for (int64_t v = s * kSpanRows; v < end; v += kUnitRows) {
      const int64_t height = least(kUnitRows, end - v), lda = direct ? p_.weight_stride : p_.hidden;
      const uint16_t* a = static_cast<const uint16_t*>(p_.weight) + v * p_.weight_stride;
      if (!direct) {
        a = rounded_rows.data();
        for (int64_t i = 0; i < height; ++i) {
          to_bf16(p_.weight, p_.weight_dtype, (v + i) * p_.weight_stride, p_.hidden, rounded_rows.data() + i * p_.hidden);
        }
      }
      for (int64_t t = 0; t < p_.tokens; t += kTokenBlock) {
        const int64_t width = round_up(least(kTokenBlock, p_.tokens - t), kTokenPad);
        alignas(64) float c[kUnitRows * kTokenBlock];
        for (int64_t h = 0; h < p_.hidden; h += kDepth) {
          gemm_(height, width, least(kDepth, p_.hidden - h), lda, width, width, h > 0, a + h,
                p_.packed + t * p_.hidden + h * width, c);
        }
        for (int64_t g = 0; g < width; g += kLanes) {
          unit(Unit{c + g, width, v, height, t + g, s}, p_.sums ? k.data() : k_.data());
        }
      }
    }
  }

  // Adds the spans up and brings the gradient to one k per token. One span after the other, so that a result does not depend
  // on how many there are in a block.
  void finish(ParallelFor run) {
    if (!p_.sums) return;
    Buffer<float> here(padded_);
    bool differ = false;
    for (int64_t s = 0; s < spans_; ++s) {
      __builtin_memcpy(here.data(), k_.data(), padded_ * sizeof(float));
      for (const Raise& r : raises_[s]) here[r.token] = r.k;
      for (int64_t t = 0; t < p_.tokens; ++t) {
        double e = sum_row(s, kSumE)[t], ez = 0, ee = 0;
        if (p_.outputs) {
          ez = sum_row(s, kSumEz)[t];
          ee = sum_row(s, kSumEe)[t];
        }
        if (here[t] < p_.k[t]) {
          shift(double(here[t]) - double(p_.k[t]), e, ez, ee);
        } else if (here[t] > p_.k[t]) {
          double none = 0;
          shift(double(p_.k[t]) - double(here[t]), total(kSumE, t), p_.outputs & kWantEz ? total(kSumEz, t) : none,
                p_.outputs & kWantEe ? total(kSumEe, t) : none);
          p_.k[t] = here[t];
        }
        add_to(t, e, ez, ee);
      }
      add_others(s);
    }
    for (int64_t t = 0; t < p_.tokens; ++t) differ |= p_.k[t] != k_[t];
    if (p_.gradient && differ) parallel(run, spans_, [&](int64_t s) { rescale_span(s, p_.k); });
  }

 private:
  struct Unit {
    const float* c;  // one vector of tokens, rows `stride` apart
    int64_t stride, row, height, token, span;
  };

  float* sum_row(int64_t span, int sum) { return sums_.data() + (span * kept_ + sum) * padded_; }
  double& total(int sum, int64_t t) { return p_.sums[sum * p_.tokens + t]; }

  void add_to(int64_t t, double e, double ez, double ee) {
    total(kSumE, t) += e;
    if (p_.outputs & kWantEz) total(kSumEz, t) += ez;
    if (p_.outputs & kWantEe) total(kSumEe, t) += ee;
  }

  void add_others(int64_t s) {
    for (int64_t t = 0; t < p_.tokens; ++t) {
      if (p_.outputs & kWantZ) total(kSumZ, t) += sum_row(s, kSumZ)[t];
      if (p_.outputs & kWantTop) {
        for (int sum = kSumTarget; sum < kNumSums; ++sum) {
          const double value = sum_row(s, sum)[t];
          if (value > total(sum, t)) total(sum, t) = value;
        }
      }
    }
  }

  static void shift(double by, double& e, double& ez, double& ee) {
    const double factor = __builtin_exp(by);
    ez = factor > 0 ? (ez + by * e) * factor : 0;
    ee *= factor * factor;
    e *= factor;
  }

  void unit(const Unit& u, float* k) {
    const Int<float> labels = load_bits<Int<float>>(labels_.data() + u.token) - int32_t(u.row);
    const bool has_label = any((labels >= 0) & (labels < int32_t(u.height)));
    if (!p_.sums) {
      gradient_only(u, labels, k);
    } else if (general_) {
      if (!scan<true, true>(u, labels, k, false)) {
        raise(u, labels, k);
        scan<true, true>(u, labels, k, true);
      }
    } else if (!(has_label ? scan<false, true>(u, labels, k, false) : scan<false, false>(u, labels, k, false))) {
      raise(u, labels, k);
      scan<false, true>(u, labels, k, true);
    }
  }

  LOGITLESS_INLINE static bool any(Int<float> mask) {
    bool found = false;
    for (int i = 0; i < kLanes; ++i) found |= mask[i] != 0;
    return found;
  }

  // The head's two factors for a vector of tokens: before a soft-cap's tanh, and after it. See Head.
  struct Factors {
    Vec<float> inner, outer;
  };

  LOGITLESS_INLINE Factors factors(const Unit& u) {
    Factors f{splat(head_.inner), splat(head_.outer)};
    if (p_.inverse_temperature) (head_.capped ? f.outer : f.inner) *= load_bits<Vec<float>>(factors_.data() + u.token);
    return f;
  }

  // The logits of row i of the unit, and their slopes.
  template <bool General>
  LOGITLESS_INLINE Vec<float> logits(const Unit& u, int64_t i, const Factors& f, Vec<float>& slope) const {
    Vec<float> r = load_bits<Vec<float>>(u.c + i * u.stride);
    if (!General) return r * f.inner;
    if (p_.bias) r += p_.bias[u.row + i];
    r = rounded(r, p_.rounding);
    return head_.capped ? tanh<float>(r * f.inner, slope) * f.outer : r * f.inner;
  }

  LOGITLESS_INLINE void store(const Unit& u, int64_t i, Vec<float> g) const {
    bfloat16* out = reinterpret_cast<bfloat16*>(p_.gradient + (u.row + i) * p_.tokens + u.token);
    if (p_.tokens - u.token >= kLanes) {
      store_entry<float>(out, g);
    } else if (p_.tokens > u.token) {
      store_some<float>(out, g, int(p_.tokens - u.token));
    }
  }

  LOGITLESS_INLINE static void add(float* to, Vec<float> x) { store_bits(to, load_bits<Vec<float>>(to) + x); }
  LOGITLESS_INLINE static void keep_larger(float* to, Vec<float> x) {
    store_bits(to, larger<float>(load_bits<Vec<float>>(to), x));
  }

  // Sums and gradient of one vector of tokens; false, with nothing added, where a k must be raised first.
  template <bool General, bool HasLabel>
  LOGITLESS_INLINE bool scan(const Unit& u, Int<float> labels, const float* ks, bool certain) {
    const Vec<float> k = load_bits<Vec<float>>(ks + u.token), lowest = splat(-__builtin_inff());
    const Factors f = factors(u);
    Vec<float> e_sum{}, ez_sum{}, ee_sum{}, z_sum{}, target = lowest, before = lowest, after = lowest;
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<General>(u, i, f, slope);
      if (General && (p_.outputs & kWantZ)) z_sum += z;
      if (General && (p_.outputs & kWantTop)) {
        target = labels == int32_t(i) ? z : target;
        before = labels > int32_t(i) ? larger<float>(before, z) : before;
        after = labels < int32_t(i) ? larger<float>(after, z) : after;
      }
      if (HasLabel) z = labels == int32_t(i) ? lowest : z;
      const Vec<float> d = z - k;
      Vec<float> e = exp<float>(d);
      e_sum += e;
      if (General && (p_.outputs & kWantEz)) ez_sum += e * (d < float(kFloor) ? splat(float(kFloor)) : d);
      if (General && (p_.outputs & kWantEe)) ee_sum += e * e;
      if (p_.gradient) store(u, i, General && sloped_ ? e * slope : e);
    }
    if (!certain && any(~(e_sum <= float(kRaiseSum)))) return false;
    add(sum_row(u.span, kSumE) + u.token, e_sum);
    if (General) {
      if (p_.outputs & kWantEz) add(sum_row(u.span, kSumEz) + u.token, ez_sum);
      if (p_.outputs & kWantEe) add(sum_row(u.span, kSumEe) + u.token, ee_sum);
      if (p_.outputs & kWantZ) add(sum_row(u.span, kSumZ) + u.token, z_sum);
      if (p_.outputs & kWantTop) {
        keep_larger(sum_row(u.span, kSumTarget) + u.token, target);
        keep_larger(sum_row(u.span, kSumBefore) + u.token, before);
        keep_larger(sum_row(u.span, kSumAfter) + u.token, after);
      }
    }
    return true;
  }

  // Raises k to the unit's maximum for tokens whose sum exceeds kRaiseSum, and rescales the span's sums to it.
  void raise(const Unit& u, Int<float> labels, float* ks) {
    const Vec<float> lowest = splat(-__builtin_inff()), k = load_bits<Vec<float>>(ks + u.token);
    const Factors f = factors(u);
    Vec<float> top = lowest, sum{};
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<true>(u, i, f, slope);
      z = labels == int32_t(i) ? lowest : z;
      top = larger<float>(z, top);
      sum += exp<float>(z - k);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (sum[lane] <= float(kRaiseSum) || !(top[lane] > k[lane])) continue;
      const int64_t t = u.token + lane;
      double e = sum_row(u.span, kSumE)[t], ez = 0, ee = 0;
      if (p_.outputs) {
        ez = sum_row(u.span, kSumEz)[t];
        ee = sum_row(u.span, kSumEe)[t];
      }
      shift(double(k[lane]) - double(top[lane]), e, ez, ee);
      sum_row(u.span, kSumE)[t] = float(e);
      if (p_.outputs) {
        sum_row(u.span, kSumEz)[t] = float(ez);
        sum_row(u.span, kSumEe)[t] = float(ee);
      }
      ks[t] = top[lane];
      raises_[u.span].add({u.row, t, top[lane]});
    }
  }

  void gradient_only(const Unit& u, Int<float> labels, const float* ks) {
    const Vec<float> k = load_bits<Vec<float>>(ks + u.token), lowest = splat(-__builtin_inff());
    const Factors f = factors(u);
    Vec<float> mix[2] = {splat(1.0f), Vec<float>{}};
    if (p_.mix) {
      const int count = int(least(p_.tokens - u.token, kLanes));
      for (int i = 0; i < 2; ++i) mix[i] = load_some<float>(p_.mix + i * p_.tokens + u.token, count > 0 ? count : 0);
    }
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<true>(u, i, f, slope);
      z = labels == int32_t(i) ? lowest : z;
      const Vec<float> d = z - k;
      Vec<float> g = exp<float>(d);
      if (p_.mix) g *= (d < float(kFloor) ? splat(float(kFloor)) : d) * mix[1] + mix[0];
      store(u, i, head_.capped ? g * slope : g);
    }
  }

  void rescale_span(int64_t s, const float* top) {
    Buffer<float> factor(padded_);
    for (int64_t t = 0; t < p_.tokens; ++t) factor[t] = float(__builtin_exp(double(k_[t]) - double(top[t])));
    const Raise* next = raises_[s].begin();
    const int64_t end = least((s + 1) * kSpanRows, p_.width);
    for (int64_t v = s * kSpanRows; v < end; v += kUnitRows) {
      for (; next != raises_[s].end() && next->row == v; ++next) {
        factor[next->token] = float(__builtin_exp(double(next->k) - double(top[next->token])));
      }
      rescale_columns(p_.gradient + v * p_.tokens, least(kUnitRows, end - v), p_.tokens, factor.data());
    }
  }

  const ScoreBlock& p_;
  const SmallGemm gemm_;
  const Head<float> head_;
  const bool general_, sloped_;
  const int64_t padded_, spans_, kept_;
  Buffer<float> k_;
  Buffer<int32_t> labels_;
  Buffer<float> factors_;  // inverse temperatures, padded
  Buffer<float> sums_;     // (spans, kept, padded)
  Buffer<RaiseList> raises_;
};

inline void score_block(const ScoreBlock& p, ParallelFor run, SmallGemm gemm, ReleaseGemm release) {
  constexpr int64_t step = kSpanRows * kSpans;
  const int64_t steps = (p.width + step - 1) / step;
  const bool may_raise = p.sums && p.gradient && steps > 1;
  Buffer<float> k_after(may_raise ? steps * p.tokens : 0);
  for (int64_t i = 0; i < steps; ++i) {
    ScoreBlock part = p;
    part.weight = static_cast<const char*>(p.weight) + i * step * p.weight_stride * size_of(p.weight_dtype);
    part.bias = p.bias ? p.bias + i * step : nullptr;
    part.gradient = p.gradient ? p.gradient + i * step * p.tokens : nullptr;
    part.first += i * step;
    part.width = p.width - i * step < step ? p.width - i * step : step;
    Scorer scorer(part, gemm);
    parallel(run, scorer.spans(), [&](int64_t s) {
      scorer.span(s);
      release();
    });
    scorer.finish(run);
    if (may_raise) __builtin_memcpy(k_after.data() + i * p.tokens, p.k, p.tokens * sizeof(float));
  }
  if (!may_raise) return;
  for (int64_t i = 0; i + 1 < steps; ++i) {  // k was raised later: rescale the gradient written before
    float* factor = k_after.data() + i * p.tokens;
    bool needed = false;
    for (int64_t t = 0; t < p.tokens; ++t) {
      needed |= factor[t] != p.k[t];
      factor[t] = float(__builtin_exp(double(factor[t]) - double(p.k[t])));
    }
    if (!needed) continue;
    parallel(run, kSpans, [&](int64_t s) {
      rescale_columns(p.gradient + (i * step + s * kSpanRows) * p.tokens, kSpanRows, p.tokens, factor);
    });
  }
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
