// The kernels for any machine.
#include "logitless/cpu/kernels.inc"
