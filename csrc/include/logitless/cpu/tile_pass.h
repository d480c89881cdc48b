// The element-wise pass over a block of raw logits whose rows are tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "logitless/cpu/head.h"
#include "logitless/cpu/isa.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

constexpr int kQuickChunk = 4096;  // logits at a time where only entries to write are kept

template <class Real>
class TileRow {
 public:
  TileRow(const TilePass& p, int64_t row)
      : p_(p),
        head_(p.head, p.inverse_temperature ? static_cast<const Real*>(p.inverse_temperature)[row] : Real(1)),
        plain_(!head_.capped && head_.inner == 1 && !p.bias && p.rounding == Rounding::kNone && !p.outputs && p.sums),
        row_(row) {
    k_ = static_cast<const Real*>(p.k)[row];
    if (p.mix) {
      mix_[0] = static_cast<const Real*>(p.mix)[row];
      mix_[1] = static_cast<const Real*>(p.mix)[p.mix_stride + row];
    }
  }

  void run() {
    const int64_t column = p_.labels[row_] - p_.first;
    const bool inside = column >= 0 && column < p_.width;
    double top[2] = {-__builtin_inf(), -__builtin_inf()};
    int64_t at = 0;
    if (inside) {
      load(column, column + 1);
      target_ = buffer_[0];
      segment(0, column, top[0]);
      at = column + 1;
    }
    segment(at, p_.width, inside || column < 0 ? top[1] : top[0]);
    if (p_.destination && inside) {
      write_label(column, p_.at_target ? static_cast<const Real*>(p_.at_target)[row_] : Real(0));
    }
    if (p_.sums) commit(inside, top);
  }

 private:
  void commit(bool inside, const double* top) {
    double* sums = p_.sums + row_;
    const int64_t n = p_.sums_stride;
    Real& k = static_cast<Real*>(p_.k)[row_];
    if (k_ != k && !(k_ != k_ && k != k)) {  // raised: earlier sums are relative to the old k
      const double shift = double(k) - double(k_), factor = __builtin_exp(shift);
      if (p_.outputs & kWantEz) sums[kSumEz * n] = factor > 0 ? (sums[kSumEz * n] + shift * sums[kSumE * n]) * factor : 0;
      if (p_.outputs & kWantEe) sums[kSumEe * n] *= factor * factor;
      sums[kSumE * n] *= factor;
      k = k_;
    }
    sums[kSumE * n] += e_;
    if (p_.outputs & kWantEz) sums[kSumEz * n] += ez_;
    if (p_.outputs & kWantEe) sums[kSumEe * n] += ee_;
    if (p_.outputs & kWantZ) sums[kSumZ * n] += z_ + (inside ? double(target_) : 0.0);
    if (p_.outputs & kWantTop) {
      if (inside) sums[kSumTarget * n] = target_;
      if (top[0] > sums[kSumBefore * n]) sums[kSumBefore * n] = top[0];
      if (top[1] > sums[kSumAfter * n]) sums[kSumAfter * n] = top[1];
    }
  }

  // Logits of columns c0..c1 to buffer_, their slopes to slope_.
  LOGITLESS_INLINE void load(int64_t c0, int64_t c1) {
    const int64_t count = c1 - c0;
    with_type<Real>(p_.source, p_.source_dtype, row_ * p_.source_stride + c0,
                    [&](auto* from) { widen<Real>(from, buffer_, count); });
    const Real* bias = p_.bias ? static_cast<const Real*>(p_.bias) + c0 : nullptr;
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<Real> r = load_bits<Vec<Real>>(buffer_ + i);
      if (bias) {
        r += count - i < lanes ? load_some<Real>(bias + i, int(count - i)) : load_bits<Vec<Real>>(bias + i);
      }
      Vec<Real> slope{};
      const Vec<Real> z = head_(rounded(r, p_.rounding), slope);
      store_bits(buffer_ + i, z);
      if (head_.capped) store_bits(slope_ + i, slope);
    }
  }

  void pad(int64_t count, Real value) {
    for (int64_t i = count; i < round_up(count, lanes); ++i) buffer_[i] = value;
  }

  void segment(int64_t c0, int64_t c1, double& top) {
    while (plain_ && c0 < c1 && quick(c0, least(kQuickChunk, c1 - c0))) c0 += kQuickChunk;
    for (int64_t c = c0; c < c1; c += kChunk) {
      const int64_t end = c + kChunk < c1 ? c + kChunk : c1, count = end - c;
      load(c, end);
      if (p_.sums && (p_.outputs & kWantZ)) {
        pad(count, 0);
        Vec<Real> total{};
        for (int64_t i = 0; i < count; i += lanes) total += load_bits<Vec<Real>>(buffer_ + i);
        z_ += sum_lanes<Real>(total);
      }
      pad(count, Real(-__builtin_inf()));
      if (p_.sums && (p_.outputs & kWantTop)) {
        const double here = largest(count);
        top = here > top ? here : top;
      }
      if (!p_.sums) {
        finish_gradient(count);
      } else if (!exponentials(count, raised_)) {
        raise(c);
        load(c, end);  // raise() used the buffer
        pad(count, Real(-__builtin_inf()));
        exponentials(count, true);
      }
      if (p_.destination) write(c, count);
    }
  }

  // Logits that are only exponentiated, without a buffer in between; false, and nothing done, where k must be raised. Sums have
  // the bits of the buffered path: a log-probability must not depend on which other outputs are asked for.
  bool quick(int64_t c, int64_t count) {
    double total = e_;
    bool low = true;
    alignas(64) char
        written[kQuickChunk * sizeof(Real)];  // the destination may be the source, which is still needed if k is raised
    with_type<Real>(p_.source, p_.source_dtype, row_ * p_.source_stride + c, [&](auto* source) {
      const auto add = [&](auto* to) {
        for (int64_t i = 0; i < count; i += kChunk) {
          const Real some = exponentials_between(source + i, to ? to + i : nullptr, least(kChunk, count - i));
          low &= some <= Real(kRaiseSum);
          total += some;
        }
      };
      if (!p_.destination) {
        add(static_cast<Real*>(nullptr));
        return;
      }
      with_destination([&](auto* row) {
        using T = std::remove_pointer_t<decltype(row)>;
        add(reinterpret_cast<T*>(written));
        if (raised_ || low) __builtin_memcpy(row + c, written, count * sizeof(T));
      });
    });
    if (!raised_ && !low) return false;
    e_ = total;
    return true;
  }

  template <class Source, class T>
  LOGITLESS_INLINE Real exponentials_between(const Source* source, T* to, int64_t count) const {
    Vec<Real> sum{};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Vec<Real> e = exp<Real>(Memory<Real, std::remove_cv_t<Source>>::load(source + i) - k_);
      sum += e;
      if (to) store_entry<Real>(to + i, e);
    }
    if (i < count) {
      const int some = int(count - i);
      Vec<Real> e = exp<Real>(load_some<Real>(source + i, some) - k_);
      for (int j = some; j < lanes; ++j) e[j] = 0;
      sum += e;
      if (to) store_some<Real>(to + i, e, some);
    }
    return sum_lanes<Real>(sum);
  }

  double largest(int64_t count) const {
    Vec<Real> top = load_bits<Vec<Real>>(buffer_);
    for (int64_t i = lanes; i < count; i += lanes) top = larger<Real>(top, load_bits<Vec<Real>>(buffer_ + i));
    return max_lanes<Real>(top);
  }

  // Exponentials of the buffer and their sums; false, and nothing added, where k must be raised first.
  template <bool EZ, bool EE>
  LOGITLESS_INLINE bool exponentials_of(int64_t count, bool certain) {
    Vec<Real> e_sum{}, ez_sum{}, ee_sum{};
    for (int64_t i = 0; i < count; i += lanes) {
      const Vec<Real> d = load_bits<Vec<Real>>(buffer_ + i) - k_;
      const Vec<Real> e = exp<Real>(d);
      e_sum += e;
      if (EZ) ez_sum += e * (d < Real(kFloor) ? splat(Real(kFloor)) : d);
      if (EE) ee_sum += e * e;
      store_bits(work_ + i, e);
    }
    const Real total = sum_lanes<Real>(e_sum);
    if (!certain && !(total <= Real(kRaiseSum))) return false;
    e_ += total;
    if (EZ) ez_ += sum_lanes<Real>(ez_sum);
    if (EE) ee_ += sum_lanes<Real>(ee_sum);
    return true;
  }

  bool exponentials(int64_t count, bool certain) {
    const bool ez = p_.outputs & kWantEz, ee = p_.outputs & kWantEe;
    return ez || ee ? exponentials_of<true, true>(count, certain) : exponentials_of<false, false>(count, certain);
  }

  // Raises k to the largest logit from column c on, once per row, and rescales sums and entries so far.
  void raise(int64_t c) {
    raised_ = true;
    double top = k_;
    const int64_t label = p_.labels[row_] - p_.first;
    for (int64_t a = c; a < p_.width; a += kChunk) {
      const int64_t b = a + kChunk < p_.width ? a + kChunk : p_.width;
      load(a, b);
      pad(b - a, Real(-__builtin_inf()));
      if (label >= a && label < b) buffer_[label - a] = Real(-__builtin_inf());
      const double here = largest(b - a);
      top = here > top ? here : top;
    }
    const Real raised = Real(top);
    const double shift = double(k_) - double(raised), factor = __builtin_exp(shift);
    ez_ = factor > 0 ? (ez_ + shift * e_) * factor : 0;
    ee_ *= factor * factor;
    e_ *= factor;
    if (p_.destination) rescale_written(c, Real(factor));
    k_ = raised;
  }

  void finish_gradient(int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
      const Vec<Real> d = load_bits<Vec<Real>>(buffer_ + i) - k_;
      Vec<Real> g = exp<Real>(d);
      if (p_.mix) g *= (d < Real(kFloor) ? splat(Real(kFloor)) : d) * mix_[1] + mix_[0];
      store_bits(work_ + i, g);
    }
  }

  template <class F>
  void with_destination(F&& f) const {
    with_type<Real>(p_.destination, p_.destination_dtype, row_ * p_.destination_stride, f);
  }

  void write(int64_t c, int64_t count) {
    if (head_.capped && !(p_.outputs & kWithoutSlope)) {
      for (int64_t i = 0; i < count; i += lanes) {
        store_bits(work_ + i, load_bits<Vec<Real>>(work_ + i) * load_bits<Vec<Real>>(slope_ + i));
      }
    }
    with_destination([&](auto* row) { narrow<Real>(work_, row + c, count); });
  }

  void write_label(int64_t column, Real value) {
    work_[0] = value;
    with_destination([&](auto* row) { narrow<Real>(work_, row + column, 1); });
  }

  void rescale_written(int64_t count, Real factor) {
    with_destination([&](auto* row) { rescale<Real>(row, count, factor); });
  }

  static constexpr int lanes = Lanes<Real>::count;
  const TilePass& p_;
  const Head<Real> head_;
  const bool plain_;  // only exponentials and their sum are asked for
  const int64_t row_;
  Real k_, mix_[2] = {1, 0}, target_ = 0;
  bool raised_ = false;
  double e_ = 0, ez_ = 0, ee_ = 0, z_ = 0;
  alignas(64) Real buffer_[kChunk], work_[kChunk], slope_[kChunk];
};

inline void tile_pass(const TilePass& p, ParallelFor run) {
  if (p.tokens == 0) return;
  const int64_t some = p.width > 0 ? (1 << 16) / p.width + 1 : p.tokens;  // rows per task: at least 2^16 logits
  parallel(run, (p.tokens + some - 1) / some, [&](int64_t task) {
    const int64_t end = task * some + some < p.tokens ? task * some + some : p.tokens;
    for (int64_t row = task * some; row < end; ++row) {
      if (p.source_dtype == DType::kFloat64) {
        TileRow<double>(p, row).run();
      } else {
        TileRow<float>(p, row).run();
      }
    }
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
