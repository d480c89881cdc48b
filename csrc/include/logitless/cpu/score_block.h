// Logits by small GEMMs into the cache, and exponentials there: rows are vocabulary entries, lanes are tokens, so sums need no
// horizontal step and the gradient comes out as the dW GEMM reads it. Included by kernels.inc.

constexpr int64_t kUnitRows = 64;  // vocabulary entries of one small GEMM
constexpr int64_t kDepth = 1024;   // hidden elements of one small GEMM
// Vocabulary entries whose sums are kept together, in float32: the unit of parallel work. It depends on nothing and spans are
// added up in their order, in float64, so a sum is the same for any number of threads and any blocks that are multiples of it.
constexpr int64_t kSpanRows = 256;
constexpr int64_t kSpans = 64;  // as many at a time: what they need for each token is bounded

// Tokens in blocks of kTokenBlock (the last one padded to kTokenPad with zeros), each as the small GEMM's B: (hidden / 2,
// block, 2).
inline void pack_tokens(const PackRows& p, ParallelFor run) {
  parallel(run, (p.rows + kTokenBlock - 1) / kTokenBlock, [&](int64_t block) {
    const int64_t t0 = block * kTokenBlock;
    const int64_t width = round_up(p.rows - t0 < kTokenBlock ? p.rows - t0 : kTokenBlock, kTokenPad);
    uint16_t* out = p.out + t0 * p.hidden;
    for (int64_t h = 0; h < p.hidden; h += 2) {
      for (int64_t j = 0; j < width; ++j) {
        uint32_t pair = 0;
        if (t0 + j < p.rows) __builtin_memcpy(&pair, p.x + (t0 + j) * p.x_stride + h, 4);
        __builtin_memcpy(out + h * width + 2 * j, &pair, 4);
      }
    }
  });
}

// A row of the weight in bf16.
inline void to_bf16(const void* from, DType type, int64_t offset, int64_t count, uint16_t* to) {
  BF16* out = reinterpret_cast<BF16*>(to);
  with_type<float>(from, type, offset, [&](auto* row) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(row)>>;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Memory<float, BF16>::store(out + i, Memory<float, T>::load(row + i));
    if (i < count) store_some<float>(out + i, load_some<float>(row + i, int(count - i)), int(count - i));
  });
}

// A token's k, raised from a vocabulary row of a span on.
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

// Zeros; not a std::vector, whose code would be shared with callers that lack this instruction set.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(count ? static_cast<T*>(__builtin_calloc(count, sizeof(T))) : nullptr) {
    if (count && !data_) __builtin_abort();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    for (int64_t i = 0; i < count_; ++i) data_[i].~T();
    __builtin_free(data_);
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  const int64_t count_;
  T* const data_;
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
      BF16* g = reinterpret_cast<BF16*>(gradient + i * rows + t);
      store_some<float>(g, load_some<float>(g, some) * f, some);
    }
  }
}

class Scorer {
 public:
  Scorer(const ScoreBlock& p, SmallGemm gemm)
      : p_(p),
        gemm_(gemm),
        transform_(p.head),
        general_(transform_.capped || p.bias || p.rounding || p.mix || p.outputs),
        sloped_(transform_.capped && !(p.outputs & WithoutSlope)),
        padded_(round_up(p.rows, kTokenPad)),
        spans_((p.width + kSpanRows - 1) / kSpanRows),
        kept_(p.outputs ? NumSums : 1),
        k_(padded_),
        labels_(padded_),
        sums_(p.sums ? spans_ * kept_ * padded_ : 0),
        raises_(spans_) {
    for (int64_t t = 0; t < padded_; ++t) {
      // a padding token's logits are as far below its k as can be
      k_[t] = t >= p.rows ? 1e30f : p.sums ? p.start[t] : p.k[t];
      labels_[t] = t < p.rows && p.labels[t] >= p.first && p.labels[t] < p.first + p.width ? int32_t(p.labels[t] - p.first)
                   : t < p.rows && p.labels[t] < p.first                                   ? -1
                                                                                           : int32_t(p.width);
    }
  }

  int64_t spans() const { return spans_; }

  void span(int64_t s) {
    Buffer<float> k(p_.sums ? padded_ : 0);  // of this span: it may be raised
    if (p_.sums) __builtin_memcpy(k.data(), k_.data(), padded_ * sizeof(float));
    if (p_.sums && (p_.outputs & WantTop)) {
      for (int sum = SumTarget; sum < NumSums; ++sum) {
        for (int64_t t = 0; t < padded_; ++t) sum_row(s, sum)[t] = -__builtin_inff();
      }
    }
    const int64_t end = least((s + 1) * kSpanRows, p_.width);
    const bool direct = p_.weight_type == DType::BFloat16;
    Buffer<uint16_t> rounded_rows(direct ? 0 : kUnitRows * p_.hidden);
    for (int64_t v = s * kSpanRows; v < end; v += kUnitRows) {
      const int64_t height = least(kUnitRows, end - v), lda = direct ? p_.weight_stride : p_.hidden;
      const uint16_t* a = static_cast<const uint16_t*>(p_.weight) + v * p_.weight_stride;
      if (!direct) {
        a = rounded_rows.data();
        for (int64_t i = 0; i < height; ++i) {
          to_bf16(p_.weight, p_.weight_type, (v + i) * p_.weight_stride, p_.hidden, rounded_rows.data() + i * p_.hidden);
        }
      }
      for (int64_t t = 0; t < p_.rows; t += kTokenBlock) {
        const int64_t width = round_up(least(kTokenBlock, p_.rows - t), kTokenPad);
        alignas(64) float c[kUnitRows * kTokenBlock];
        for (int64_t h = 0; h < p_.hidden; h += kDepth) {
          gemm_(height, width, least(kDepth, p_.hidden - h), lda, width, width, h > 0, a + h,
                p_.tokens + t * p_.hidden + h * width, c);
        }
        for (int64_t g = 0; g < width; g += kLanes) {
          unit(Unit{c + g, width, v, height, t + g, s}, p_.sums ? k.data() : k_.data());
        }
      }
    }
  }

  // Adds the spans up and brings the gradient to one k for each token. One span after the other, so that a result does not
  // depend on how many there are in a block.
  void finish(ParallelFor run) {
    if (!p_.sums) return;
    Buffer<float> here(padded_);
    bool differ = false;
    for (int64_t s = 0; s < spans_; ++s) {
      __builtin_memcpy(here.data(), k_.data(), padded_ * sizeof(float));
      for (const Raise& r : raises_[s]) here[r.token] = r.k;
      for (int64_t t = 0; t < p_.rows; ++t) {
        double e = sum_row(s, SumE)[t], ez = 0, ee = 0;
        if (p_.outputs) {
          ez = sum_row(s, SumEZ)[t];
          ee = sum_row(s, SumEE)[t];
        }
        if (here[t] < p_.k[t]) {
          shift(double(here[t]) - double(p_.k[t]), e, ez, ee);
        } else if (here[t] > p_.k[t]) {
          double none = 0;
          shift(double(p_.k[t]) - double(here[t]), total(SumE, t), p_.outputs & WantEZ ? total(SumEZ, t) : none,
                p_.outputs & WantEE ? total(SumEE, t) : none);
          p_.k[t] = here[t];
        }
        add_to(t, e, ez, ee);
      }
      add_others(s);
    }
    for (int64_t t = 0; t < p_.rows; ++t) differ |= p_.k[t] != k_[t];
    if (p_.gradient && differ) parallel(run, spans_, [&](int64_t s) { rescale_span(s, p_.k); });
  }

 private:
  struct Unit {
    const float* c;  // one vector of tokens, rows `stride` apart
    int64_t stride, row, height, token, span;
  };

  float* sum_row(int64_t span, int sum) { return sums_.data() + (span * kept_ + sum) * padded_; }
  double& total(int sum, int64_t t) { return p_.sums[sum * p_.rows + t]; }

  void add_to(int64_t t, double e, double ez, double ee) {
    total(SumE, t) += e;
    if (p_.outputs & WantEZ) total(SumEZ, t) += ez;
    if (p_.outputs & WantEE) total(SumEE, t) += ee;
  }

  void add_others(int64_t s) {
    for (int64_t t = 0; t < p_.rows; ++t) {
      if (p_.outputs & WantZ) total(SumZ, t) += sum_row(s, SumZ)[t];
      if (p_.outputs & WantTop) {
        for (int sum = SumTarget; sum < NumSums; ++sum) {
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

  // The logits of row i of the unit, and their slopes.
  template <bool General>
  LOGITLESS_INLINE Vec<float> logits(const Unit& u, int64_t i, Vec<float>& slope) const {
    Vec<float> r = load_bits<Vec<float>>(u.c + i * u.stride);
    if (!General) return r * transform_.inner;
    if (p_.bias) r += p_.bias[p_.first + u.row + i];
    return transform_(rounded(r, p_.rounding), slope);
  }

  LOGITLESS_INLINE void store(const Unit& u, int64_t i, Vec<float> g) const {
    BF16* out = reinterpret_cast<BF16*>(p_.gradient + (u.row + i) * p_.rows + u.token);
    if (p_.rows - u.token >= kLanes) {
      store_entry<float>(out, g);
    } else if (p_.rows > u.token) {
      store_some<float>(out, g, int(p_.rows - u.token));
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
    Vec<float> e_sum{}, ez_sum{}, ee_sum{}, z_sum{}, target = lowest, before = lowest, after = lowest;
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<General>(u, i, slope);
      if (General && (p_.outputs & WantZ)) z_sum += z;
      if (General && (p_.outputs & WantTop)) {
        target = labels == int32_t(i) ? z : target;
        before = labels > int32_t(i) ? larger<float>(before, z) : before;
        after = labels < int32_t(i) ? larger<float>(after, z) : after;
      }
      if (HasLabel) z = labels == int32_t(i) ? lowest : z;
      const Vec<float> d = z - k;
      Vec<float> e = exp<float>(d);
      e_sum += e;
      if (General && (p_.outputs & WantEZ)) ez_sum += e * (d < float(kFloor) ? splat(float(kFloor)) : d);
      if (General && (p_.outputs & WantEE)) ee_sum += e * e;
      if (p_.gradient) store(u, i, General && sloped_ ? e * slope : e);
    }
    if (!certain && any(~(e_sum <= float(kRaiseSum)))) return false;
    add(sum_row(u.span, SumE) + u.token, e_sum);
    if (General) {
      if (p_.outputs & WantEZ) add(sum_row(u.span, SumEZ) + u.token, ez_sum);
      if (p_.outputs & WantEE) add(sum_row(u.span, SumEE) + u.token, ee_sum);
      if (p_.outputs & WantZ) add(sum_row(u.span, SumZ) + u.token, z_sum);
      if (p_.outputs & WantTop) {
        keep_larger(sum_row(u.span, SumTarget) + u.token, target);
        keep_larger(sum_row(u.span, SumBefore) + u.token, before);
        keep_larger(sum_row(u.span, SumAfter) + u.token, after);
      }
    }
    return true;
  }

  // Raises k to the unit's maximum for the tokens whose sum says so, and brings the span's sums to it.
  void raise(const Unit& u, Int<float> labels, float* ks) {
    const Vec<float> lowest = splat(-__builtin_inff()), k = load_bits<Vec<float>>(ks + u.token);
    Vec<float> top = lowest, sum{};
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<true>(u, i, slope);
      z = labels == int32_t(i) ? lowest : z;
      top = larger<float>(z, top);
      sum += exp<float>(z - k);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (sum[lane] <= float(kRaiseSum) || !(top[lane] > k[lane])) continue;
      const int64_t t = u.token + lane;
      double e = sum_row(u.span, SumE)[t], ez = 0, ee = 0;
      if (p_.outputs) {
        ez = sum_row(u.span, SumEZ)[t];
        ee = sum_row(u.span, SumEE)[t];
      }
      shift(double(k[lane]) - double(top[lane]), e, ez, ee);
      sum_row(u.span, SumE)[t] = float(e);
      if (p_.outputs) {
        sum_row(u.span, SumEZ)[t] = float(ez);
        sum_row(u.span, SumEE)[t] = float(ee);
      }
      ks[t] = top[lane];
      raises_[u.span].add({u.row, t, top[lane]});
    }
  }

  void gradient_only(const Unit& u, Int<float> labels, const float* ks) const {
    const Vec<float> k = load_bits<Vec<float>>(ks + u.token), lowest = splat(-__builtin_inff());
    Vec<float> mix[2] = {splat(1.0f), Vec<float>{}};
    if (p_.mix) {
      const int count = int(least(p_.rows - u.token, kLanes));
      for (int i = 0; i < 2; ++i) mix[i] = load_some<float>(p_.mix + i * p_.rows + u.token, count > 0 ? count : 0);
    }
    for (int64_t i = 0; i < u.height; ++i) {
      Vec<float> slope{};
      Vec<float> z = logits<true>(u, i, slope);
      z = labels == int32_t(i) ? lowest : z;
      const Vec<float> d = z - k;
      Vec<float> g = exp<float>(d);
      if (p_.mix) g *= (d < float(kFloor) ? splat(float(kFloor)) : d) * mix[1] + mix[0];
      store(u, i, transform_.capped ? g * slope : g);
    }
  }

  void rescale_span(int64_t s, const float* top) {
    Buffer<float> factor(padded_);
    for (int64_t t = 0; t < p_.rows; ++t) factor[t] = float(__builtin_exp(double(k_[t]) - double(top[t])));
    const Raise* next = raises_[s].begin();
    const int64_t end = least((s + 1) * kSpanRows, p_.width);
    for (int64_t v = s * kSpanRows; v < end; v += kUnitRows) {
      for (; next != raises_[s].end() && next->row == v; ++next) {
        factor[next->token] = float(__builtin_exp(double(next->k) - double(top[next->token])));
      }
      rescale_columns(p_.gradient + v * p_.rows, least(kUnitRows, end - v), p_.rows, factor.data());
    }
  }

  const ScoreBlock& p_;
  const SmallGemm gemm_;
  const Transform<float> transform_;
  const bool general_, sloped_;
  const int64_t padded_, spans_, kept_;
  Buffer<float> k_;
  Buffer<int32_t> labels_;
  Buffer<float> sums_;  // (spans, kept, padded)
  Buffer<RaiseList> raises_;
};

inline void score_block(const ScoreBlock& p, ParallelFor run, SmallGemm gemm, ReleaseGemm release) {
  constexpr int64_t step = kSpanRows * kSpans;
  const int64_t steps = (p.width + step - 1) / step;
  const bool may_raise = p.sums && p.gradient && steps > 1;
  Buffer<float> k_after(may_raise ? steps * p.rows : 0);
  for (int64_t i = 0; i < steps; ++i) {
    ScoreBlock part = p;
    part.weight = static_cast<const char*>(p.weight) + i * step * p.weight_stride * size_of(p.weight_type);
    part.gradient = p.gradient ? p.gradient + i * step * p.rows : nullptr;
    part.first += i * step;
    part.width = p.width - i * step < step ? p.width - i * step : step;
    Scorer scorer(part, gemm);
    parallel(run, scorer.spans(), [&](int64_t s) {
      scorer.span(s);
      release();
    });
    scorer.finish(run);
    if (may_raise) __builtin_memcpy(k_after.data() + i * p.rows, p.k, p.rows * sizeof(float));
  }
  if (!may_raise) return;
  for (int64_t i = 0; i + 1 < steps; ++i) {  // k was raised later: bring the gradient written before to it
    float* factor = k_after.data() + i * p.rows;
    bool needed = false;
    for (int64_t t = 0; t < p.rows; ++t) {
      needed |= factor[t] != p.k[t];
      factor[t] = float(__builtin_exp(double(factor[t]) - double(p.k[t])));
    }
    if (!needed) continue;
    parallel(run, kSpans,
             [&](int64_t s) { rescale_columns(p.gradient + (i * step + s * kSpanRows) * p.rows, kSpanRows, p.rows, factor); });
  }
}
