// N neighbouring elements of a row: by 16-byte accesses where the address allows, else one by one.
//
// Which thread handles which element does not depend on addresses, so a row's sums have the same bits wherever it lies.
#pragma once

#include <cstdint>
#include <type_traits>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/dtype.h"

namespace logitless::cuda {

constexpr int kAccess = 16;  // bytes of the widest load and store

// N elements of T as 32-bit words of storage.
template <typename T, int N>
struct Words {
  static constexpr int kCount = N * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kCount];
};

template <int kBytes>
struct alignas(kBytes) Granule {
  uint32_t word[kBytes / 4];
};

template <typename T, int N>
constexpr int kGranule = N * static_cast<int>(sizeof(T)) < kAccess ? N * static_cast<int>(sizeof(T)) : kAccess;

// Whether vectors of N elements from `row` on lie on their natural boundaries.
template <typename T, int N>
__device__ inline bool is_aligned(const void* row) {
  return reinterpret_cast<uintptr_t>(row) % kGranule<T, N> == 0;
}

template <typename T, int N>
__device__ inline Words<T, N> load_words(const T* at) {
  constexpr int kBytes = kGranule<T, N>;
  Words<T, N> words;
#pragma unroll
  for (int g = 0; g < words.kCount * 4 / kBytes; ++g) {
    const auto granule = reinterpret_cast<const Granule<kBytes>*>(at)[g];
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words.word[g * (kBytes / 4) + i] = granule.word[i];
  }
  return words;
}

template <typename T, int N>
__device__ inline void store_words(T* at, const Words<T, N>& words) {
  constexpr int kBytes = kGranule<T, N>;
#pragma unroll
  for (int g = 0; g < words.kCount * 4 / kBytes; ++g) {
    Granule<kBytes> granule;
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) granule.word[i] = words.word[g * (kBytes / 4) + i];
    reinterpret_cast<Granule<kBytes>*>(at)[g] = granule;
  }
}

template <typename T, int N, typename Acc>
__device__ inline void unpack(const Words<T, N>& words, Acc (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 2) {
      if (i % 2 == 0) {
        float low, high;
        unpack_pair<T>(words.word[i / 2], low, high);
        values[i] = low;
        values[i + 1] = high;
      }
    } else if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words.word[i]);
    } else {
      values[i] =
          static_cast<Acc>(__hiloint2double(static_cast<int>(words.word[2 * i + 1]), static_cast<int>(words.word[2 * i])));
    }
  }
}

template <typename T, int N, typename Acc>
__device__ inline Words<T, N> pack(const Acc (&values)[N]) {
  Words<T, N> words;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 2) {
      if (i % 2 == 0) {
        words.word[i / 2] = pack_pair<T>(static_cast<float>(values[i]), static_cast<float>(values[i + 1]));
      }
    } else if constexpr (sizeof(T) == 4) {
      words.word[i] = __float_as_uint(static_cast<float>(values[i]));
    } else {
      const double value = values[i];
      words.word[2 * i] = static_cast<uint32_t>(__double2loint(value));
      words.word[2 * i + 1] = static_cast<uint32_t>(__double2hiint(value));
    }
  }
  return words;
}

// values[i] = row[column + i], 0 from `width` on. `aligned`: see is_aligned. Index: int where registers are scarce.
template <typename T, int N, typename Index, typename Acc>
__device__ inline void load(const T* row, Index column, Index width, bool aligned, Acc (&values)[N]) {
  if (aligned && column + N <= width) {
    unpack<T, N>(load_words<T, N>(row + column), values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = column + i < width ? static_cast<Acc>(widen(row[column + i])) : Acc{0};
  }
}

// row[column + i] = values[i], below `width`.
template <typename T, int N, typename Index, typename Acc>
__device__ inline void store(T* row, Index column, Index width, bool aligned, const Acc (&values)[N]) {
  if (aligned && column + N <= width) {
    store_words<T, N>(row + column, pack<T, N>(values));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < width) row[column + i] = narrow<T>(values[i]);
    }
  }
}

// The same for a type known at run time; alignment is determined here.
template <int N, typename Index, typename Acc>
__device__ inline void load_any(const void* row, DType dtype, Index column, Index width, Acc (&values)[N]) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    load<T, N>(static_cast<const T*>(row), column, width, is_aligned<T, N>(row), values);
  });
}

template <int N, typename Index, typename Acc>
__device__ inline void store_any(void* row, DType dtype, Index column, Index width, const Acc (&values)[N]) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store<T, N>(static_cast<T*>(row), column, width, is_aligned<T, N>(row), values);
  });
}

}  // namespace logitless::cuda
