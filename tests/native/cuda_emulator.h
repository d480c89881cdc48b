// Runs CUDA kernels on a CPU: the same headers, compiled by a C++ compiler.
//
// One block at a time; each of its threads is a fiber that runs until it meets the others at a barrier or a shuffle. Fibers
// take turns in an order that the test chooses, so code that lacks a barrier gives results that depend on that order. Memory is
// plain memory: an address sanitizer sees accesses out of bounds, and an undefined-behaviour sanitizer those off alignment.
//
// Not covered: warps that diverge inside of a shuffle, memory order between blocks, and anything about speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define LOGITLESS_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), logitless::emulator::launch((grid), (block), [=] { (kernel)(__VA_ARGS__); }))

using cudaStream_t = void*;

struct EmulatedDim {
  unsigned x = 1;
};
inline EmulatedDim threadIdx, blockIdx, blockDim, gridDim;

namespace logitless::emulator {

constexpr unsigned kLanes = 32;
constexpr std::size_t kStackBytes = 32 << 10;

// Where some threads meet. A round is over when all have arrived; nobody can be two rounds ahead, so two slots are enough.
struct Meeting {
  unsigned members = 0;
  unsigned arrived = 0;
  std::uint64_t round = 0;
  std::uint64_t slot[2][kLanes] = {};
  int any[2] = {};
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = true;
  const Meeting* waiting = nullptr;
  std::uint64_t until = 0;
};

struct Machine {
  ucontext_t scheduler{};
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  std::function<void()> kernel;
  unsigned current = 0;
  // 0: ascending, 1: descending, else: the seed of a shuffle.
  unsigned order = 0;
};

inline Machine machine;

inline void fiber_main() {
  machine.kernel();
  machine.fibers[machine.current].done = true;
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

// Counts this thread in and lets others run until all are. Returns the slot of the round.
inline unsigned meet(Meeting& meeting) {
  const std::uint64_t round = meeting.round;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    meeting.any[(round + 1) % 2] = 0;
    ++meeting.round;
  } else {
    Fiber& self = machine.fibers[machine.current];
    self.waiting = &meeting;
    self.until = round + 1;
    swapcontext(&self.context, &machine.scheduler);
  }
  return static_cast<unsigned>(round % 2);
}

inline void run_block(unsigned threads) {
  machine.block = Meeting{};
  machine.block.members = threads;
  machine.warps.assign(threads / kLanes, Meeting{});
  for (Meeting& warp : machine.warps) warp.members = kLanes;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.done = false;
    fiber.waiting = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  if (machine.order == 1) std::reverse(turns.begin(), turns.end());
  if (machine.order > 1) std::shuffle(turns.begin(), turns.end(), std::mt19937(machine.order));
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (const unsigned t : turns) {
      Fiber& fiber = machine.fibers[t];
      if (fiber.done || (fiber.waiting != nullptr && fiber.waiting->round < fiber.until)) continue;
      fiber.waiting = nullptr;
      machine.current = t;
      threadIdx.x = t;
      swapcontext(&machine.scheduler, &fiber.context);
      moved = true;
      if (fiber.done) --left;
    }
    if (!moved) {
      std::fprintf(stderr, "emulator: some threads wait at a barrier or shuffle that others never reach\n");
      std::abort();
    }
  }
}

inline void launch(unsigned grid, unsigned threads, std::function<void()> kernel) {
  if (grid == 0 || threads == 0 || threads % kLanes != 0 || threads > 1024) {
    std::fprintf(stderr, "emulator: cannot launch %u blocks of %u threads\n", grid, threads);
    std::abort();
  }
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.kernel = std::move(kernel);
  gridDim.x = grid;
  blockDim.x = threads;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    run_block(threads);
  }
}

}  // namespace logitless::emulator

// -- what kernels call

inline void __syncthreads() { logitless::emulator::meet(logitless::emulator::machine.block); }

inline int __syncthreads_or(int predicate) {
  auto& block = logitless::emulator::machine.block;
  if (predicate) block.any[block.round % 2] = 1;
  const unsigned slot = logitless::emulator::meet(block);
  return block.any[slot];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  using namespace logitless::emulator;
  if (mask != 0xffffffffu) std::abort();
  Meeting& warp = machine.warps[threadIdx.x / kLanes];
  const unsigned lane = threadIdx.x % kLanes;
  std::memcpy(&warp.slot[warp.round % 2][lane], &value, sizeof(T));
  const unsigned slot = meet(warp);
  std::memcpy(&value, &warp.slot[slot][lane ^ static_cast<unsigned>(lane_mask)], sizeof(T));
  return value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <typename To, typename From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned bits) { return emulated_bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulated_bit_cast<unsigned>(value); }
inline double __hiloint2double(int high, int low) {
  return emulated_bit_cast<double>(std::uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}
inline int __double2hiint(double value) { return static_cast<int>(emulated_bit_cast<std::uint64_t>(value) >> 32); }
inline int __double2loint(double value) { return static_cast<int>(emulated_bit_cast<std::uint64_t>(value)); }

namespace logitless::cuda {

// The conversions that dtype.cuh has as instructions.
inline float float16_to_float(std::uint16_t bits) { return static_cast<float>(emulated_bit_cast<_Float16>(bits)); }
inline std::uint32_t floats_to_float16x2(float low, float high) {
  const auto half = [](float value) { return emulated_bit_cast<std::uint16_t>(static_cast<_Float16>(value)); };
  return std::uint32_t{half(high)} << 16 | half(low);
}
inline std::uint32_t floats_to_bfloat16x2(float low, float high) {
  const auto round = [](float value) -> std::uint32_t {
    if (std::isnan(value)) return 0x7fff;
    const std::uint32_t bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(high) << 16 | round(low);
}

}  // namespace logitless::cuda

extern "C" void logitless_emulator_order(unsigned order);
