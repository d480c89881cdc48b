// Work on rows of [tokens, hidden] and [vocabulary, hidden]: indexed dot, scaling, scattering, conversion. Included by
// kernels.inc.

template <class Real>
void indexed_dot_row(const IndexedDot& p, int64_t t) {
  constexpr int lanes = Lanes<Real>::count;
  alignas(64) Real a[kChunk], b[kChunk];
  const int64_t label = p.labels[t];
  double total = 0;
  for (int64_t h = 0; h < p.hidden; h += kChunk) {
    const int64_t count = least(kChunk, p.hidden - h);
    with_type<Real>(p.x, p.x_type, t * p.x_stride + h, [&](auto* x) { widen<Real>(x, a, count); });
    if (p.weight_type == DType::Float64 && sizeof(Real) == 4) {
      const double* w = static_cast<const double*>(p.weight) + label * p.weight_stride + h;
      for (int64_t i = 0; i < count; ++i) b[i] = Real(w[i]);
    } else if (p.weight_type != DType::Float64 && sizeof(Real) == 8) {
      alignas(64) float wide[kChunk];
      with_type<float>(p.weight, p.weight_type, label * p.weight_stride + h, [&](auto* w) { widen<float>(w, wide, count); });
      for (int64_t i = 0; i < count; ++i) b[i] = wide[i];
    } else {
      with_type<Real>(p.weight, p.weight_type, label * p.weight_stride + h, [&](auto* w) { widen<Real>(w, b, count); });
    }
    for (int64_t i = count; i < round_up(count, lanes); ++i) a[i] = b[i] = 0;
    Vec<Real> sum{};
    for (int64_t i = 0; i < count; i += lanes) {
      Vec<Real> w = load_bits<Vec<Real>>(b + i);
      if (p.weight_type != p.x_type) w = rounded(w, rounding_to(p.x_type));
      sum += load_bits<Vec<Real>>(a + i) * w;
    }
    total += sum_lanes<Real>(sum);
  }
  if (p.bias) total += static_cast<const Real*>(p.bias)[label];
  Vec<Real> result = splat(Real(total));
  if (p.match) result = rounded(result, rounding_to(p.x_type));
  static_cast<Real*>(p.out)[t] = result[0];
}

inline void indexed_dot(const IndexedDot& p, ParallelFor run) {
  parallel(run, p.rows, [&](int64_t t) {
    if (p.x_type == DType::Float64) {
      indexed_dot_row<double>(p, t);
    } else {
      indexed_dot_row<float>(p, t);
    }
  });
}

inline void finish_rows(const FinishRows& p, ParallelFor run) {
  parallel(run, p.rows, [&](int64_t t) {
    float* row = p.values + t * p.hidden;
    with_type<float>(p.weight, p.weight_type, p.labels[t] * p.weight_stride, [&](auto* w) {
      for (int64_t h = 0; h < p.hidden; h += kLanes) {
        const int some = int(least(kLanes, p.hidden - h));
        const Vec<float> label = rounded(load_some<float>(w + h, some), RoundToBFloat16);
        store_some<float>(row + h, load_some<float>(row + h, some) * p.scale[t] + label * p.target[t], some);
      }
    });
  });
}

template <class Real>
LOGITLESS_INLINE void scaled_copy(const Real* from, Real factor, int64_t count, void* out, DType type, int64_t offset) {
  constexpr int lanes = Lanes<Real>::count;
  with_type<Real>(out, type, offset, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) Memory<Real, T>::store(to + i, load_bits<Vec<Real>>(from + i) * factor);
    if (i < count) store_some<Real>(to + i, load_some<Real>(from + i, int(count - i)) * factor, int(count - i));
  });
}

template <class Real>
void scale_scatter_rows(const ScaleScatter& p, ParallelFor run) {
  parallel(run, p.count, [&](int64_t i) {
    const Real factor = static_cast<const Real*>(p.factor)[p.factor_per_row ? i : 0];
    scaled_copy(static_cast<const Real*>(p.values) + i * p.hidden, factor, p.hidden, p.out, p.out_type, p.rows[i] * p.hidden);
  });
}

inline void scale_scatter(const ScaleScatter& p, ParallelFor run) {
  p.wide ? scale_scatter_rows<double>(p, run) : scale_scatter_rows<float>(p, run);
}

template <class Real>
void scaled_convert_all(const ScaledConvert& p, ParallelFor run) {
  constexpr int64_t step = 1 << 16;
  const Real factor = *static_cast<const Real*>(p.factor);
  parallel(run, (p.count + step - 1) / step, [&](int64_t i) {
    const int64_t offset = i * step;
    scaled_copy(static_cast<const Real*>(p.source) + offset, factor, least(step, p.count - offset), p.out, p.out_type, offset);
  });
}

inline void scaled_convert(const ScaledConvert& p, ParallelFor run) {
  p.wide ? scaled_convert_all<double>(p, run) : scaled_convert_all<float>(p, run);
}
