// The element-wise pass over a block of raw logits whose rows are tokens. Included by kernels.inc.

constexpr int kChunk = 1024;       // logits that a row works on at a time, in the L1 cache
constexpr int kQuickChunk = 4096;  // where it keeps nothing but the entries to write

// Raw logits to logits, for vectors: scale, or soft-cap.
template <class Real>
struct Transform {
  Real inner, outer;
  bool capped;

  explicit Transform(const Head& h)
      : inner(Real(h.cap > 0 ? h.scale / h.cap : h.scale / h.temperature)),
        outer(Real(h.cap > 0 ? h.cap / h.temperature : 1)),
        capped(h.cap > 0) {}

  LOGITLESS_INLINE Vec<Real> operator()(Vec<Real> r, Vec<Real>& slope) const {
    if (!capped) return r * inner;
    return tanh<Real>(r * inner, slope) * outer;
  }
};

LOGITLESS_INLINE Vec<float> rounded(Vec<float> r, Rounding rounding) {
  if (rounding == RoundToBFloat16) return bf16_to_float(float_to_bf16(r));
  if (rounding == RoundToFloat16) return fp16_to_float(float_to_fp16(r));
  return r;
}
LOGITLESS_INLINE Vec<double> rounded(Vec<double> r, Rounding) { return r; }

inline Rounding rounding_to(DType type) {
  return type == DType::BFloat16 ? RoundToBFloat16 : type == DType::Float16 ? RoundToFloat16 : KeepFloat;
}

template <class Real, class T>
inline void widen(const T* from, Real* to, int64_t count) {
  constexpr int lanes = Lanes<Real>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_bits(to + i, Memory<Real, T>::load(from + i));
  if (i < count) store_bits(to + i, load_some<Real>(from + i, int(count - i)));
}

template <class Real, class T>
inline void narrow(const Real* from, T* to, int64_t count) {
  constexpr int lanes = Lanes<Real>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) Memory<Real, T>::store(to + i, load_bits<Vec<Real>>(from + i));
  if (i < count) store_some<Real>(to + i, load_bits<Vec<Real>>(from + i), int(count - i));
}

// f with a typed pointer to element `offset`.
template <class Real, class F>
LOGITLESS_INLINE void with_type(void* base, DType type, int64_t offset, F&& f) {
  if constexpr (sizeof(Real) == 8) {
    f(static_cast<double*>(base) + offset);
  } else {
    switch (type) {
      case DType::BFloat16: f(static_cast<BF16*>(base) + offset); break;
      case DType::Float16: f(static_cast<FP16*>(base) + offset); break;
      default: f(static_cast<float*>(base) + offset);
    }
  }
}

template <class Real, class F>
LOGITLESS_INLINE void with_type(const void* base, DType type, int64_t offset, F&& f) {
  with_type<Real>(const_cast<void*>(base), type, offset, static_cast<F&&>(f));
}

// The destination scaled by a factor, where k was raised after it was written.
template <class Real, class T>
inline void rescale(T* row, int64_t count, Real factor) {
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t i = 0; i < count; i += lanes) {
    const int some = int(count - i < lanes ? count - i : lanes);
    store_some<Real>(row + i, load_some<Real>(row + i, some) * factor, some);
  }
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Real>
class TileRow {
 public:
  TileRow(const TilePass& p, int64_t row)
      : p_(p),
        transform_(p.head),
        plain_(!transform_.capped && transform_.inner == 1 && !p.bias && !p.rounding && !p.outputs && p.sums),
        row_(row) {
    k_ = static_cast<const Real*>(p.k)[row];
    if (p.mix) {
      mix_[0] = static_cast<const Real*>(p.mix)[row];
      mix_[1] = static_cast<const Real*>(p.mix)[p.rows + row];
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
    const int64_t n = p_.rows;
    Real& k = static_cast<Real*>(p_.k)[row_];
    if (k_ != k && !(k_ != k_ && k != k)) {  // raised: what came before is relative to the old one
      const double shift = double(k) - double(k_), factor = __builtin_exp(shift);
      if (p_.outputs & WantEZ) sums[SumEZ * n] = factor > 0 ? (sums[SumEZ * n] + shift * sums[SumE * n]) * factor : 0;
      if (p_.outputs & WantEE) sums[SumEE * n] *= factor * factor;
      sums[SumE * n] *= factor;
      k = k_;
    }
    sums[SumE * n] += e_;
    if (p_.outputs & WantEZ) sums[SumEZ * n] += ez_;
    if (p_.outputs & WantEE) sums[SumEE * n] += ee_;
    if (p_.outputs & WantZ) sums[SumZ * n] += z_ + (inside ? double(target_) : 0.0);
    if (p_.outputs & WantTop) {
      if (inside) sums[SumTarget * n] = target_;
      if (top[0] > sums[SumBefore * n]) sums[SumBefore * n] = top[0];
      if (top[1] > sums[SumAfter * n]) sums[SumAfter * n] = top[1];
    }
  }

  // Logits of columns c0..c1 to z_buffer_, their slopes to slope_buffer_; lanes past the end are -inf.
  LOGITLESS_INLINE void load(int64_t c0, int64_t c1) {
    const int64_t count = c1 - c0;
    with_type<Real>(p_.source, p_.source_type, row_ * p_.source_stride + c0,
                    [&](auto* from) { widen<Real>(from, buffer_, count); });
    const Real* bias = p_.bias ? static_cast<const Real*>(p_.bias) + p_.first + c0 : nullptr;
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<Real> r = load_bits<Vec<Real>>(buffer_ + i);
      if (bias) {
        r += count - i < lanes ? load_some<Real>(bias + i, int(count - i)) : load_bits<Vec<Real>>(bias + i);
      }
      Vec<Real> slope{};
      const Vec<Real> z = transform_(rounded(r, p_.rounding), slope);
      store_bits(buffer_ + i, z);
      if (transform_.capped) store_bits(slope_ + i, slope);
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
      if (p_.sums && (p_.outputs & WantZ)) {
        pad(count, 0);
        Vec<Real> total{};
        for (int64_t i = 0; i < count; i += lanes) total += load_bits<Vec<Real>>(buffer_ + i);
        z_ += sum_lanes<Real>(total);
      }
      pad(count, Real(-__builtin_inf()));
      if (p_.sums && (p_.outputs & WantTop)) {
        const double here = largest(count);
        top = here > top ? here : top;
      }
      if (!p_.sums) {
        finish_gradient(count);
      } else if (!exponentials(count, raised_)) {
        raise(c);
        load(c, end);  // raise() has looked ahead with the buffer
        pad(count, Real(-__builtin_inf()));
        exponentials(count, true);
      }
      if (p_.destination) write(c, count);
    }
  }

  // Logits that are only exponentiated, without a stop in memory; false, and nothing done, where k must be raised. Sums are
  // those of the slower way, to the bit: a log-probability must not depend on what else is asked for.
  bool quick(int64_t c, int64_t count) {
    double total = e_;
    bool low = true;
    alignas(64) char written[kQuickChunk * sizeof(Real)];  // not to the destination yet: that may be the source
    with_type<Real>(p_.source, p_.source_type, row_ * p_.source_stride + c, [&](auto* source) {
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

  // e over the buffer and its sums; false, and nothing added, where k must be raised first.
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
    const bool ez = p_.outputs & WantEZ, ee = p_.outputs & WantEE;
    return ez || ee ? exponentials_of<true, true>(count, certain) : exponentials_of<false, false>(count, certain);
  }

  // Raise k to the largest logit from column c on, once for the row, and bring what is done to it.
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
    with_type<Real>(p_.destination, p_.destination_type, row_ * p_.destination_stride, f);
  }

  void write(int64_t c, int64_t count) {
    if (transform_.capped && !(p_.outputs & WithoutSlope)) {
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
  const Transform<Real> transform_;
  const bool plain_;  // nothing asked for but exponentials and their sum
  const int64_t row_;
  Real k_, mix_[2] = {1, 0}, target_ = 0;
  bool raised_ = false;
  double e_ = 0, ez_ = 0, ee_ = 0, z_ = 0;
  alignas(64) Real buffer_[kChunk], work_[kChunk], slope_[kChunk];
};

inline void tile_pass(const TilePass& p, ParallelFor run) {
  if (p.rows == 0) return;
  const int64_t some = p.width > 0 ? (1 << 16) / p.width + 1 : p.rows;  // rows a task: a task is worth its start
  parallel(run, (p.rows + some - 1) / some, [&](int64_t task) {
    const int64_t end = task * some + some < p.rows ? task * some + some : p.rows;
    for (int64_t row = task * some; row < end; ++row) {
      if (p.source_type == DType::Float64) {
        TileRow<double>(p, row).run();
      } else {
        TileRow<float>(p, row).run();
      }
    }
  });
}

template <class Real>
void finish_tile_row(const FinishTile& p, int64_t row) {
  with_type<Real>(p.tile, p.tile_type, row * p.tile_stride, [&](auto* tile) {
    for (int64_t j = 0, first = 0; p.factors && first < p.columns; ++j, first += p.width) {
      const Real factor = static_cast<const Real*>(p.factors)[j * p.rows + row];
      if (factor != 1) rescale<Real>(tile + first, least(p.width, p.columns - first), factor);
    }
    if (p.at_target) store_some<Real>(tile + p.labels[row], splat(static_cast<const Real*>(p.at_target)[row]), 1);
  });
}

inline void finish_tile(const FinishTile& p, ParallelFor run) {
  parallel(run, p.rows, [&](int64_t row) {
    p.tile_type == DType::Float64 ? finish_tile_row<double>(p, row) : finish_tile_row<float>(p, row);
  });
}
