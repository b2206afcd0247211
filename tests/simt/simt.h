// CUDA kernels executed on the CPU: a kernel body that is compiled for the host includes this instead of PTX.
// docs/kernels.md describes the checks and the use.
#pragma once

#include "machine.h"   // launch(), modes, threadIdx and similar variables
#include "ptx_host.h"  // the host's version of csrc/cuda/ptx.cuh
