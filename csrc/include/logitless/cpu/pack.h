// Operands in the order in which the small GEMM reads them.
#pragma once

#include <cstdint>

#include "logitless/cpu/isa.h"
#include "logitless/cpu/ops.h"
#include "logitless/cpu/platform.h"
#include "logitless/cpu/storage.h"
#include "logitless/cpu/vec.h"
#include "logitless/dtype.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

// Tokens in blocks of kTokenBlock (the last one padded to kTokenPad with zeros), each as the small GEMM's B: (hidden / 2,
// block, 2).
inline void pack_tokens(const Pack& p, ParallelFor run) {
  parallel(run, (p.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t block) {
    const int64_t t0 = block * kTokenBlock;
    const int64_t width = round_up(p.tokens - t0 < kTokenBlock ? p.tokens - t0 : kTokenBlock, kTokenPad);
    uint16_t* out = p.out + t0 * p.hidden;
    for (int64_t h = 0; h < p.hidden; h += 2) {
      for (int64_t j = 0; j < width; ++j) {
        uint32_t pair = 0;
        if (t0 + j < p.tokens) __builtin_memcpy(&pair, p.x + (t0 + j) * p.x_stride + h, 4);
        __builtin_memcpy(out + h * width + 2 * j, &pair, 4);
      }
    }
  });
}

// (count, columns) rows of bf16 as the small GEMM's B: (count / 2, ld, 2); an odd last row is paired with zeros.
inline void interleave(const uint16_t* rows, int64_t stride, int64_t count, int64_t columns, int64_t ld, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 2) {
    const uint16_t* even = rows + i * stride;
    const uint16_t* odd = i + 1 < count ? even + stride : nullptr;
    uint16_t* to = out + i * ld;
    int64_t j = 0;
    for (; odd && j + kLanes <= columns; j += kLanes) {
      const Word low = __builtin_convertvector(load_bits<Half>(even + j), Word);
      const Word high = __builtin_convertvector(load_bits<Half>(odd + j), Word);
      store_bits(to + 2 * j, low | (high << 16));
    }
    for (; j < columns; ++j) {
      to[2 * j] = even[j];
      to[2 * j + 1] = odd ? odd[j] : 0;
    }
  }
}

LOGITLESS_INLINE void scale_to_bf16(const uint16_t* x, float scale, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec<float> v = bf16_to_float(load_bits<Half>(x + i)) * scale;
    store_bits(out + i, float_to_bf16(v));
  }
  const bfloat16* rest = reinterpret_cast<const bfloat16*>(x + i);
  if (i < count)
    store_some<float>(reinterpret_cast<bfloat16*>(out + i), load_some<float>(rest, int(count - i)) * scale, int(count - i));
}

// scale * x in bf16, in blocks of kHiddenBlock columns, each as the small GEMM's B: (rows / 2, kHiddenBlock, 2).
inline void pack_rows(const Pack& p, ParallelFor run) {
  const int64_t even = round_up(p.tokens, 2);
  parallel(run, (p.hidden + kHiddenBlock - 1) / kHiddenBlock, [&](int64_t block) {
    const int64_t h = block * kHiddenBlock, columns = least(kHiddenBlock, p.hidden - h);
    uint16_t* out = p.out + h * even;
    uint16_t pair[2 * kHiddenBlock] = {};
    for (int64_t t = 0; t < even; t += 2) {
      for (int64_t i = 0; i < 2; ++i) {
        uint16_t* row = pair + i * kHiddenBlock;
        if (t + i < p.tokens) {
          scale_to_bf16(p.x + (t + i) * p.x_stride + h, p.scale[t + i], columns, row);
        } else {
          __builtin_memset(row, 0, kHiddenBlock * 2);
        }
      }
      interleave(pair, kHiddenBlock, 2, kHiddenBlock, kHiddenBlock, out + t * kHiddenBlock);
    }
  });
}

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
