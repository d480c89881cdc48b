// Lets one header serve host C++ and CUDA device code.
#pragma once

#if defined(__CUDACC__)
#define LOGITLESS_HOST_DEVICE __host__ __device__
#else
#define LOGITLESS_HOST_DEVICE
#endif
