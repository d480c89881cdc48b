// Scratch memory of a kernel.
#pragma once

#include <cstdint>

#include "logitless/cpu/isa.h"

LOGITLESS_TARGET_BEGIN
namespace logitless::cpu::LOGITLESS_ISA {

// Starts as zeros. Not a std::vector: see isa.h.
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

}  // namespace logitless::cpu::LOGITLESS_ISA
LOGITLESS_TARGET_END
