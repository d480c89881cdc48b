// The operators on GPUs, all of them in ../bindings/operators.h. One build serves torch 2.10 and later: LibTorch's stable ABI.

// What of the stable ABI may be used: no more than torch 2.10 has. USE_CUDA uncovers its declarations about CUDA, which a wheel
// without CUDA carries too.
#if !defined(TORCH_TARGET_VERSION)
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif
#if !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../bindings/checks.h"
#include "../bindings/operators.h"
#include "logitless/cuda/launch.cuh"
#include "logitless/cuda/platform.cuh"

// The tests compile this file against the emulator and register it beside the real operators.
#if defined(LOGITLESS_CUDA_EMULATOR)
#define LOGITLESS_NAMESPACE logitless_emulated
#define LOGITLESS_DISPATCH_KEY CPU
#else
#define LOGITLESS_NAMESPACE logitless
#define LOGITLESS_DISPATCH_KEY CUDA
#endif

namespace logitless::bindings {
namespace {

#if defined(LOGITLESS_CUDA_EMULATOR)
struct Gpu {
  static constexpr bool kMixesTypes = true, kHostMemory = false;

  explicit Gpu(const Tensor&) {}
  template <class Op>
  void run(const Op& op) const {
    cuda::launch(op, nullptr);
  }
};
#else
// Makes the tensor's device current while it lives, and launches on that device's current stream.
class Gpu {
 public:
  static constexpr bool kMixesTypes = true, kHostMemory = false;

  explicit Gpu(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  template <class Op>
  void run(const Op& op) const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    cuda::launch(op, static_cast<cudaStream_t>(stream));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

}  // namespace
}  // namespace logitless::bindings

// Two steps, for the namespace and the key to be expanded before the macro makes names of them.
#define LOGITLESS_IMPLEMENT(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)

LOGITLESS_IMPLEMENT(LOGITLESS_NAMESPACE, LOGITLESS_DISPATCH_KEY, m) {
  using namespace logitless::bindings;
  implement_operators<Gpu>(m);
}
