// The reference kernels under every schedule, and without each synchronization.
#include "kernels/cases.h"

int main(int argc, char** argv) { return simt::main_of(argc, argv, reference_cases::all()); }
