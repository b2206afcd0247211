// A context is a stack and a position in it: it stands for a GPU thread on the CPU. Switching costs a few
// nanoseconds (x86-64) or two system calls (elsewhere, ucontext). AddressSanitizer is notified of every switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define SIMT_UCONTEXT 1
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

class Context {
 public:
  Context() = default;  // the running one, or one that is not started yet
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The next resume() runs entry(argument) on a fresh stack. entry must not return: it ends with leave(..., true).
  void start(void (*entry)(void*), void* argument);

  // Switches from `home` to this context; returns when this one calls leave(home).
  void resume(Context& home);
  // Switches from this context back to `home`. last: it will not be resumed.
  void leave(Context& home, bool last);

 private:
  static void trampoline();
  void switch_to(Context& other, bool last);

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  char* stack_ = nullptr;         // a guard page, then the stack
  const void* bottom_ = nullptr;  // for AddressSanitizer, as is size_
  std::size_t size_ = 0;
#if !defined(SIMT_UCONTEXT)
  void* pointer_ = nullptr;
#else
  ucontext_t place_;
#endif
};

}  // namespace simt
