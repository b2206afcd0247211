// CUDA kernels executed on the CPU: what a kernel body that is compiled for the host includes instead of PTX.
// docs/kernels.md describes the checks and the use.
#pragma once

#include "machine.h"   // launch(), modes, threadIdx and its like
#include "ptx_host.h"  // the host's version of csrc/cuda/ptx.cuh
