// What the sanitized run of the CPU kernels needs of a framework: arrays of exact size, threads, a small GEMM, comparisons.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "logitless/cpu/kernels.h"
#include "logitless/cpu/ops.h"
#include "logitless/cpu/platform.h"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cpu::sanitized {

constexpr DType F32 = DType::kFloat32, F64 = DType::kFloat64, BF16 = DType::kBFloat16, F16 = DType::kFloat16;

// 16-bit formats, decoded and rounded by arithmetic: nothing shared with the kernels' bit tricks.
struct Format {
  int exponent, mantissa;
  int bias() const { return (1 << (exponent - 1)) - 1; }
};
constexpr Format kBF16{8, 7}, kFP16{5, 10};

inline double decode(uint16_t bits, Format f) {
  const int all = (1 << f.exponent) - 1, e = (bits >> f.mantissa) & all, m = bits & ((1 << f.mantissa) - 1);
  const double size =
      e == all ? (m ? NAN : INFINITY) : std::ldexp(e ? m + (1 << f.mantissa) : m, (e ? e : 1) - f.bias() - f.mantissa);
  return bits >> 15 ? -size : size;
}

inline uint16_t encode(double x, Format f) {
  const int sign = std::signbit(x) ? 1 << 15 : 0, infinity = ((1 << f.exponent) - 1) << f.mantissa, one = 1 << f.mantissa;
  x = std::fabs(x);
  if (std::isnan(x)) return uint16_t(infinity | (one >> 1));
  if (std::isinf(x)) return uint16_t(sign | infinity);
  int e = x > 0 ? std::max(std::ilogb(x), 1 - f.bias()) : 1 - f.bias();
  int steps = int(std::nearbyint(std::ldexp(x, f.mantissa - e)));
  if (steps == 2 * one) steps = one, ++e;
  if (e > f.bias()) return uint16_t(sign | infinity);
  return uint16_t(sign | (steps < one ? steps : ((e + f.bias()) << f.mantissa) + steps - one));
}

// x as an element of that type holds it; from float64 by way of float32, as PyTorch converts.
inline double stored(double x, DType type) {
  if (type == DType::kFloat64) return x;
  const double narrow = float(x);
  if (type == DType::kFloat32) return narrow;
  const Format f = type == DType::kBFloat16 ? kBF16 : kFP16;
  return decode(encode(narrow, f), f);
}

// Half a step in the last place of values of that type, relative; and the smallest step.
inline double unit(DType t) {
  return t == DType::kFloat64 ? 0x1p-53 : t == DType::kFloat32 ? 0x1p-24 : t == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}
inline double smallest(DType t) { return t == DType::kFloat64 ? 1e-307 : t == DType::kFloat16 ? 0x1p-24 : 2e-38; }
inline double largest(DType t) { return t == DType::kFloat64 ? 1.7e308 : t == DType::kFloat16 ? 65504 : 3.38e38; }

// On the heap, in exactly the bytes that it needs; null where empty, as in a tensor. Starts as a pattern that is NaN.
class Array {
 public:
  Array(DType type, int64_t count)
      : type_(type), count_(count), bytes_(count ? new unsigned char[size_t(count * size_of(type))] : nullptr) {
    if (count) std::memset(bytes_.get(), 0xff, size_t(count * size_of(type)));
  }
  template <class F>
  Array(DType type, int64_t count, F&& value) : Array(type, count) {
    for (int64_t i = 0; i < count; ++i) set(i, value(i));
  }
  Array(const Array& other) : Array(other.type_, other.count_) {
    if (count_) std::memcpy(bytes_.get(), other.bytes_.get(), size_t(count_ * size_of(type_)));
  }

  DType type() const { return type_; }
  int64_t size() const { return count_; }
  void* data() const { return bytes_.get(); }
  float* floats() const { return at_type<float>(DType::kFloat32); }
  double* doubles() const { return at_type<double>(DType::kFloat64); }
  uint16_t* bf16() const { return at_type<uint16_t>(DType::kBFloat16); }

  double operator[](int64_t i) const {
    const unsigned char* at = bytes_.get() + i * size_of(type_);
    if (type_ == DType::kFloat64) return read<double>(at);
    if (type_ == DType::kFloat32) return read<float>(at);
    return decode(read<uint16_t>(at), type_ == DType::kBFloat16 ? kBF16 : kFP16);
  }
  void set(int64_t i, double x) {
    unsigned char* at = bytes_.get() + i * size_of(type_);
    if (type_ == DType::kFloat64) return write(at, x);
    if (type_ == DType::kFloat32) return write(at, float(x));
    write(at, encode(float(x), type_ == DType::kBFloat16 ? kBF16 : kFP16));
  }
  bool same_bits(const Array& other) const {
    return count_ == other.count_ && (!count_ || !std::memcmp(data(), other.data(), size_t(count_ * size_of(type_))));
  }

 private:
  template <class T>
  T* at_type(DType type) const {
    if (type != type_) std::abort();
    return reinterpret_cast<T*>(bytes_.get());
  }
  template <class T>
  static T read(const unsigned char* at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
  }
  template <class T>
  static void write(unsigned char* at, T x) {
    std::memcpy(at, &x, sizeof(T));
  }

  DType type_;
  int64_t count_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// int64s on the heap, null where there are none.
class Labels {
 public:
  template <class F>
  Labels(int64_t count, F&& value) : values_(count ? new int64_t[size_t(count)] : nullptr) {
    for (int64_t i = 0; i < count; ++i) values_[size_t(i)] = value(i);
  }
  const int64_t* data() const { return values_.get(); }
  int64_t operator[](int64_t i) const { return values_[size_t(i)]; }

 private:
  std::unique_ptr<int64_t[]> values_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  double normal() {  // near enough: a sum of uniforms
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += double(next() >> 11) * 0x1p-53;
    return sum;
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }

 private:
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

// Rows with gaps, ending with the last element.
inline Array matrix(DType type, int64_t rows, int64_t columns, int64_t stride, Random& random, double size = 1) {
  return Array(type, rows ? (rows - 1) * stride + columns : 0, [&](int64_t) { return size * random.normal(); });
}

// Its elements as a kernel sees them that rounds to `as`; decoded once, since references read them often.
inline std::vector<double> seen(const Array& a, DType as) {
  std::vector<double> out;
  for (int64_t i = 0; i < a.size(); ++i) out.push_back(stored(a[i], as));
  return out;
}

inline std::atomic<int> failures{0}, comparisons{0};

inline void fail(const char* format, ...) {
  if (++failures > 40) return;
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

inline void expect_near(const char* what, int64_t i, double got, double want, double error) {
  ++comparisons;
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  if (!same && !(std::fabs(got - want) <= error)) {
    fail("%s [%lld]: got %.9g, want %.9g within %.3g", what, static_cast<long long>(i), got, want, error);
  }
}

inline void expect(bool ok, const char* what) {
  ++comparisons;
  if (!ok) fail("%s", what);
}

// Whether this thread's GEMM holds something that a task must release before it ends.
inline thread_local bool gemm_held = false;

inline void small_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                       const uint16_t* b, float* c) {
  if (m < 1 || n < 1 || k < 2 || k % 2 || lda < k || ldb < n || ldc < n) fail("small_gemm: bad sizes");
  gemm_held = true;
  std::vector<double> row(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) row[size_t(j)] = add ? c[i * ldc + j] : 0;
    for (int64_t h = 0; h < k; ++h) {
      uint32_t bits = uint32_t(a[i * lda + h]) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      const uint16_t* from = b + h / 2 * ldb * 2 + h % 2;
      for (int64_t j = 0; j < n; ++j) {
        bits = uint32_t(from[2 * j]) << 16;
        float y;
        std::memcpy(&y, &bits, 4);
        row[size_t(j)] += double(x) * double(y);
      }
    }
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = float(row[size_t(j)]);
  }
}

inline void release_gemm() { gemm_held = false; }

inline void run_task(int64_t i, Task fn, void* context) {
  fn(i, context);
  if (gemm_held) fail("a task has left its thread without releasing the GEMM");
}

inline void run_serial(int64_t count, Task fn, void* context) {
  for (int64_t i = count; i-- > 0;) run_task(i, fn, context);
}

inline void run_threads(int64_t count, Task fn, void* context) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < std::min<int64_t>(count, 3); ++worker) {
    threads.emplace_back([&] {
      for (int64_t i; (i = next++) < count;) run_task(i, fn, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace logitless::cpu::sanitized
