// Arithmetic under the same names for float and double.
#pragma once

#include <cmath>

#include "logitless/cuda/platform.cuh"

namespace logitless::cuda {

// Without -use_fast_math, expf is within 1 ulp and tanhf within 2 over their whole range, for 8 and about 15 instructions.
// __expf is off by 2 + |x| ulp, which at x = -30 is visible in log-probabilities; the pass is bound by memory anyway.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }
// Never fused with a following sum: kernels that write different outputs must agree bit for bit on the outputs they share.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

}  // namespace logitless::cuda
