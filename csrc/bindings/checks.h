// Checks of tensors and their pointers, for the bindings of both devices, on LibTorch's stable ABI. Every error names the
// argument, what is accepted and what was given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "logitless/dtype.h"

namespace logitless::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another type";
  }
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", name_of(tensor.scalar_type()));
  }
  return DType::kFloat32;
}

// As logitless::accumulate_type: float32, and float64 for float64 data.
inline ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", got ", name_of(tensor.scalar_type()));
}

inline void check_accumulate_type(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == accumulate_type(tensor), name, " must be float32 or float64, got ",
                  name_of(tensor.scalar_type()));
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimension(s), got ", tensor.dim());
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", tensor.size(dim));
}

// On the device of `like`, an operand that was checked before.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda(), name, " must be on ", like.is_cuda() ? "a GPU" : "the CPU",
                  " as the other arguments, got a tensor on ", tensor.is_cuda() ? "a GPU" : "the CPU");
  STD_TORCH_CHECK(tensor.get_device_index() == like.get_device_index(), name, " must be on device ", like.get_device_index(),
                  " as the other arguments, got ", tensor.get_device_index());
}

// On the device of `like`, of the given shape and type, with neighbours in the last dimension next to each other.
inline void check_tensor(const Tensor& tensor, const char* name, const Tensor& like, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> type = std::nullopt) {
  check_device(tensor, name, like);
  const auto rank = static_cast<int64_t>(shape.size());
  check_rank(tensor, name, rank);
  int64_t dim = 0;
  for (const int64_t size : shape) check_size(tensor, name, dim++, size);
  STD_TORCH_CHECK(tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1, name,
                  " must have stride 1 in its last dimension, got ", tensor.stride(rank - 1));
  if (type.has_value()) check_type(tensor, name, *type);
}

inline void check_tensor(const MaybeTensor& tensor, const char* name, const Tensor& like, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> type = std::nullopt) {
  if (tensor.has_value()) check_tensor(*tensor, name, like, shape, type);
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// On the device of `like`, contiguous, of any shape with that many elements.
inline void check_buffer(const Tensor& tensor, const char* name, const Tensor& like, int64_t elements, ScalarType type) {
  check_device(tensor, name, like);
  check_type(tensor, name, type);
  STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, got ", tensor.numel());
  check_contiguous(tensor, name);
}

inline void check_buffer(const MaybeTensor& tensor, const char* name, const Tensor& like, int64_t elements, ScalarType type) {
  if (tensor.has_value()) check_buffer(*tensor, name, like, elements, type);
}

// Rows that are written must not share memory.
inline void check_rows_apart(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1), name,
                  " must have rows that do not overlap, got a row stride of ", tensor.stride(0), " for ", tensor.size(1),
                  " columns");
}

// Elements as T, or null. The type was checked before.
template <class T = void>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
const T* pointer(const MaybeTensor& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}
template <class T = void>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T = void>
T* mutable_pointer(const MaybeTensor& tensor) {
  return tensor.has_value() ? mutable_pointer<T>(*tensor) : nullptr;
}

}  // namespace logitless::bindings
