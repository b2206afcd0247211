// CUDA kernels executed on the CPU: what a kernel body that is compiled for the host includes instead of PTX.
// docs/kernels.md says what is checked and how to use it.
#pragma once

#include "machine.h"   // launch(), modes, threadIdx and its like
#include "ptx_host.h"  // the host's version of csrc/cuda/ptx.cuh
