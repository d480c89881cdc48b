// How the memory of two matrices overlaps, from pointers and strides alone.
#pragma once

#include <cstdint>

namespace logitless::bindings {

struct MemoryRows {
  uintptr_t start;
  int64_t rows;
  int64_t row_bytes;
  int64_t stride_bytes;
  int64_t element_bytes;
};

enum class Overlap {
  kNone,
  kSame,       // element by element, rows where rows are: a thread reads what it writes before it writes
  kNarrowing,  // rows start where rows start, with smaller elements: a row is read ahead of what is written of it
  kOther,
};

inline Overlap overlap_of(const MemoryRows& source, const MemoryRows& destination) {
  const auto end = [](const MemoryRows& m) {
    return m.start + static_cast<uintptr_t>((m.rows - 1) * m.stride_bytes + m.row_bytes);
  };
  if (source.rows == 0 || source.row_bytes == 0 || destination.row_bytes == 0) return Overlap::kNone;
  if (end(source) <= destination.start || end(destination) <= source.start) return Overlap::kNone;
  const bool one_row = source.rows == 1;
  const bool same_stride = one_row || source.stride_bytes == destination.stride_bytes;
  if (source.start == destination.start && same_stride && (one_row || source.stride_bytes >= source.row_bytes)) {
    if (source.element_bytes == destination.element_bytes) return Overlap::kSame;
    if (source.element_bytes > destination.element_bytes) return Overlap::kNarrowing;
  }
  if (!one_row && same_stride) {
    // Columns side by side in one buffer. The destination's rows, seen from the source's row that starts at or before them:
    const auto stride = source.stride_bytes;
    auto offset = static_cast<int64_t>(destination.start - source.start) % stride;
    if (offset < 0) offset += stride;
    if (offset >= source.row_bytes && offset + destination.row_bytes <= stride) return Overlap::kNone;
  }
  return Overlap::kOther;
}

}  // namespace logitless::bindings
