// The streaming pass over a tile of logits: exponentials relative to an offset, their sums, and the gradient tile.
//
// A block processes a row chunk by chunk. Chunks, and each thread's elements of them, depend on the width and the type of the
// source only: the destination, alignment and other rows do not change a bit of a row's sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "logitless/cuda/dtype.cuh"
#include "logitless/cuda/head.cuh"
#include "logitless/cuda/math.cuh"
#include "logitless/cuda/platform.cuh"
#include "logitless/cuda/reduce.cuh"
#include "logitless/cuda/vector.cuh"
#include "logitless/dtype.h"
#include "logitless/ops.h"

namespace logitless::cuda {

// What the pass does besides writing the destination. A template parameter, since each costs registers and instructions per
// element.
enum class Extra { kNothing, kSum, kStatistics };  // 0, 1 and 2 in the names of kernels

constexpr int kMaxTileThreads = 256;

// 64 bytes of a row in flight per thread: about 25 kB per SM hide an H100's latency, and 3 blocks of 256 threads have 48 kB.
template <typename Source>
struct Layout {
  using Acc = Accumulate<Source>;
  static constexpr int kVector = kAccess / static_cast<int>(sizeof(Source));
  static constexpr int kElements = sizeof(Source) == 8 ? 8 : 16;
  static constexpr int kVectors = kElements / kVector;
};

// float16 ends at exp(11.09); float32 and bfloat16 have room for kRaiseAbove.
template <typename Acc>
__device__ inline Acc raise_above(const TilePass& op) {
  return op.destination != nullptr && op.destination_dtype == DType::kFloat16 ? Acc{11} : Acc{kRaiseAbove};
}

// A thread's elements of a chunk. All loads are issued before the first result is used.
template <typename Source>
__device__ inline void load_chunk(const Source* row, int column, int step, int width, bool aligned,
                                  Accumulate<Source> (&z)[Layout<Source>::kVectors][Layout<Source>::kVector]) {
  using L = Layout<Source>;
  if (aligned && column + (L::kVectors - 1) * step + L::kVector <= width) {
    Words<Source, L::kVector> words[L::kVectors];
#pragma unroll
    for (int u = 0; u < L::kVectors; ++u) words[u] = load_words<Source, L::kVector>(row + column + u * step);
#pragma unroll
    for (int u = 0; u < L::kVectors; ++u) unpack<Source, L::kVector>(words[u], z[u]);
  } else {
#pragma unroll
    for (int u = 0; u < L::kVectors; ++u) load<Source, L::kVector>(row, column + u * step, width, aligned, z[u]);
  }
}

// The label's column in the block: -1 if it is before the block, beyond every column if it is after it.
__device__ inline int label_column(int64_t label, int64_t first, int64_t width) {
  const int64_t column = label - first;
  return column < 0 ? -1 : column >= width ? INT32_MAX : static_cast<int>(column);
}

// The row's inverse temperature, where rows have their own. Read again wherever it is used, through volatile: kept in a
// register, it would cost one (of 72 or 80) in calls without temperatures too.
template <typename Acc>
__device__ inline Acc inverse_temperature(const TilePass& op, int64_t row) {
  return static_cast<const volatile Acc*>(op.inverse_temperature)[row];
}

// Logits at the head's temperature to those at the row's.
template <typename Acc, int N>
__device__ inline void temper(const TilePass& op, int64_t row, Acc (&z)[N]) {
  if (op.inverse_temperature == nullptr) return;
  const Acc own = inverse_temperature<Acc>(op, row);
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = rounded_product(z[i], own);
}

// z of one column.
template <typename Source>
__device__ inline Accumulate<Source> logit(const TilePass& op, const Head<Accumulate<Source>>& head, const Source* source,
                                           int64_t row, int column) {
  Accumulate<Source> z[1] = {widen(source[column])};
  if (op.bias != nullptr) {
    with_type(op.bias_dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      z[0] += static_cast<Accumulate<Source>>(widen(static_cast<const T*>(op.bias)[column]));
    });
  }
  head.transform(z);
  temper(op, row, z);
  return z[0];
}

// Running sums of a row over a thread's own elements.
template <typename Acc>
struct RowSums {
  Acc e = 0, ez = 0, ee = 0, z = 0;
  Acc before = -INFINITY, after = -INFINITY;

  // Brings the sums from offset k to k - shift.
  __device__ inline void rescale(Acc shift) {
    const Acc f = exponential(shift);
    ez = f > 0 ? (ez + shift * e) * f : Acc{0};  // shift may be -inf where f is 0
    e = rounded_product(e, f);
    ee *= f * f;
  }
};

// The offset for the rest of a row, from the current chunk on. top: this thread's largest logit of the chunk.
template <typename Source>
__device__ inline Accumulate<Source> raised_offset(const TilePass& op, const Head<Accumulate<Source>>& head,
                                                   const Source* source, int64_t row,
                                                   int next,  // first column after the chunk
                                                   int at, Accumulate<Source> top, double* shared) {
  const int width = static_cast<int>(op.width);
#pragma unroll 1
  for (int column = next + static_cast<int>(threadIdx.x); column < width; column += static_cast<int>(blockDim.x)) {
    if (column != at) top = larger(top, logit(op, head, source, row, column));
  }
  return block_max(top, shared);
}

// Multiplies the entries of a row written so far, except the label's.
template <typename Acc>
__device__ inline void rescale_prefix(const TilePass& op, char* destination, int count, int at, Acc factor) {
  with_type(op.destination_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = reinterpret_cast<T*>(destination);
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < count; column += static_cast<int>(blockDim.x)) {
      if (column != at) row[column] = narrow<T>(static_cast<Acc>(widen(row[column])) * factor);
    }
  });
}

// Adds the block's results to the row's in memory, which are relative to k + shift. Called by one thread.
template <Extra kExtra, typename Totals>
__device__ inline void add_sums(const TilePass& op, int64_t row, const Totals& totals, double shift) {
  const double f = shift == 0 ? 1.0 : exp(shift);
  auto& e = op.sums[kSumE * op.sums_stride + row];
  if constexpr (kExtra == Extra::kStatistics) {
    if (op.outputs & kWantEz) {
      auto& ez = op.sums[kSumEz * op.sums_stride + row];
      ez = (f > 0 ? (ez + shift * e) * f : 0.0) + totals.value[1];
    }
    if (op.outputs & kWantEe) {
      auto& ee = op.sums[kSumEe * op.sums_stride + row];
      ee = ee * f * f + totals.value[2];
    }
    if (op.outputs & kWantZ) op.sums[kSumZ * op.sums_stride + row] += totals.value[3];
    if (op.outputs & kWantTop) {
      auto& before = op.sums[kSumBefore * op.sums_stride + row];
      auto& after = op.sums[kSumAfter * op.sums_stride + row];
      before = larger(before, totals.value[4]);
      after = larger(after, totals.value[5]);
    }
  }
  e = fused_multiply_add(e, f, totals.value[0]);
}

template <typename Source, Extra kExtra>
__global__ void __launch_bounds__(kMaxTileThreads, sizeof(Source) == 8 ? 2 : 3)
    tile_pass_kernel(const TilePass op, const Head<Accumulate<Source>> head) {
  using L = Layout<Source>;
  using Acc = typename L::Acc;
  using Totals = Reduction<kExtra == Extra::kStatistics ? 4 : 1, kExtra == Extra::kStatistics ? 2 : 0>;
  constexpr bool kSumming = kExtra != Extra::kNothing;
  __shared__ double shared[kSumming ? kMaxTileThreads / kWarp * Totals::kValues : 1];

  const int width = static_cast<int>(op.width);
  const int step = static_cast<int>(blockDim.x) * L::kVector;
  const int lane_column = static_cast<int>(threadIdx.x) * L::kVector;
  const Acc limit = raise_above<Acc>(op);

  for (int64_t row = blockIdx.x; row < op.tokens; row += gridDim.x) {
    const Source* source = static_cast<const Source*>(op.source) + row * op.source_stride;
    char* destination = nullptr;
    if (op.destination != nullptr) {
      destination = static_cast<char*>(op.destination) + row * op.destination_stride * size_of(op.destination_dtype);
    }
    const bool aligned = is_aligned<Source, L::kVector>(source);
    const int at = label_column(op.labels[row], op.first, op.width);
    Acc mix[2] = {1, 0};
    if (kExtra == Extra::kNothing && op.mix != nullptr) {
      mix[0] = static_cast<const Acc*>(op.mix)[row];
      mix[1] = static_cast<const Acc*>(op.mix)[op.mix_stride + row];
    }
    Acc k = static_cast<const Acc*>(op.k)[row];
    bool raised = false;
    RowSums<Acc> sums;

    for (int start = 0; start < width; start += step * L::kVectors) {
      Acc z[L::kVectors][L::kVector];
      load_chunk<Source>(source, start + lane_column, step, width, aligned, z);
      Acc top = -INFINITY;
#pragma unroll
      for (int u = 0; u < L::kVectors; ++u) {
        const int column = start + u * step + lane_column;
        if (op.bias != nullptr) {
          Acc bias[L::kVector];
          load_any(op.bias, op.bias_dtype, column, width, bias);
#pragma unroll
          for (int i = 0; i < L::kVector; ++i) z[u][i] += bias[i];
        }
        head.transform(z[u]);
        temper(op, row, z[u]);
        if constexpr (kSumming) {
          const bool has_label = static_cast<unsigned>(at - column) < static_cast<unsigned>(L::kVector);
          if (has_label || column + L::kVector > width) {  // the label's vector, and the last one
#pragma unroll
            for (int i = 0; i < L::kVector; ++i) {
              const bool inside = column + i < width;
              if constexpr (kExtra == Extra::kStatistics) {
                sums.z += z[u][i];  // load gives 0 beyond the row, and T keeps 0
                if (column + i == at && (op.outputs & kWantTop)) op.sums[kSumTarget * op.sums_stride + row] = z[u][i];
              }
              if (!inside || column + i == at) z[u][i] = -INFINITY;
              if constexpr (kExtra == Extra::kStatistics) {
                if (column + i < at) sums.before = larger(sums.before, z[u][i]);
                if (column + i > at) sums.after = larger(sums.after, z[u][i]);
              }
              top = larger(top, z[u][i]);
            }
          } else {
            Acc largest = z[u][0], total = z[u][0];
#pragma unroll
            for (int i = 1; i < L::kVector; ++i) {
              largest = larger(largest, z[u][i]);
              total += z[u][i];
            }
            top = larger(top, largest);
            if constexpr (kExtra == Extra::kStatistics) {
              sums.z += total;
              if (column < at) {
                sums.before = larger(sums.before, largest);
              } else {
                sums.after = larger(sums.after, largest);
              }
            }
          }
        }
      }

      if (kSumming && !raised) {
        // Also the barrier that an overlapping destination needs: all threads have read the chunk.
        if (__syncthreads_or(top - k > limit)) {
          const Acc new_k = raised_offset(op, head, source, row, start + step * L::kVectors, at, top, shared);
          const Acc shift = k - new_k;
          sums.rescale(shift);
          if (destination != nullptr) rescale_prefix(op, destination, start, at, exponential(shift));
          k = new_k;
          raised = true;
        }
      } else if (op.overlapping) {
        __syncthreads();
      }

      Acc chunk_e = 0;  // summing each chunk first keeps the rounding of a long row's sum small
#pragma unroll
      for (int u = 0; u < L::kVectors; ++u) {
        const int column = start + u * step + lane_column;
        Acc g[L::kVector];
#pragma unroll
        for (int i = 0; i < L::kVector; ++i) {
          const Acc d = z[u][i] - k;
          g[i] = exponential(d);
          if constexpr (kSumming) chunk_e += g[i];
          if constexpr (kExtra == Extra::kStatistics) {
            sums.ez = fused_multiply_add(larger(d, Acc(kFloor)), g[i], sums.ez);
            sums.ee = fused_multiply_add(g[i], g[i], sums.ee);
          }
        }
        if (!kSumming && op.mix != nullptr) {
#pragma unroll
          for (int i = 0; i < L::kVector; ++i) {
            g[i] *= fused_multiply_add(mix[1], larger(z[u][i] - k, Acc(kFloor)), mix[0]);
          }
        }
        if (destination != nullptr && column < width) {
          if (head.capped && !(kExtra == Extra::kStatistics && (op.outputs & kWithoutSlope))) {
            if (op.inverse_temperature == nullptr) {
#pragma unroll
              for (int i = 0; i < L::kVector; ++i) g[i] *= head.slope(z[u][i]);
            } else {
              const Acc own = inverse_temperature<Acc>(op, row);
#pragma unroll
              for (int i = 0; i < L::kVector; ++i) g[i] *= head.slope(z[u][i] / own);
            }
          }
          if (static_cast<unsigned>(at - column) < static_cast<unsigned>(L::kVector)) {
            const Acc entry = op.at_target != nullptr ? static_cast<const Acc*>(op.at_target)[row] : Acc{0};
#pragma unroll
            for (int i = 0; i < L::kVector; ++i) g[i] = column + i == at ? entry : g[i];
          }
          store_any(destination, op.destination_dtype, column, width, g);
        }
      }
      sums.e += chunk_e;
    }

    if constexpr (kSumming) {
      Totals totals;
      totals.value[0] = sums.e;
      if constexpr (kExtra == Extra::kStatistics) {
        totals.value[1] = sums.ez;
        totals.value[2] = sums.ee;
        totals.value[3] = sums.z;
        totals.value[4] = sums.before;
        totals.value[5] = sums.after;
      }
      totals.over_block(shared);
      if (threadIdx.x == 0) {
        Acc& given_k = static_cast<Acc*>(op.k)[row];
        add_sums<kExtra>(op, row, totals, static_cast<double>(given_k) - static_cast<double>(k));
        given_k = k;
      }
    }
  }
}

// Threads per row: a warp at least, and enough elements per thread for the final reduction to be cheap in comparison.
inline int tile_threads(int64_t width) {
  int threads = kWarp;
  while (threads < kMaxTileThreads && int64_t{threads} * 64 < width) threads *= 2;
  return threads;
}

template <typename Source>
void launch_tile_pass(const TilePass& op, cudaStream_t stream) {
  const Head<Accumulate<Source>> head(op.head, op.rounding);
  auto* kernel = tile_pass_kernel<Source, Extra::kNothing>;
  if (op.sums != nullptr) {
    kernel = op.outputs != 0 ? tile_pass_kernel<Source, Extra::kStatistics> : tile_pass_kernel<Source, Extra::kSum>;
  }
  LOGITLESS_LAUNCH(kernel, blocks_for(op.tokens, 1), tile_threads(op.width), stream, op, head);
}

}  // namespace logitless::cuda
