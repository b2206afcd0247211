#include "context.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr std::size_t guard = 4096;
constexpr std::size_t stack_size = 256 * 1024;  // address space; only what is touched costs memory

Context* entered = nullptr;  // the context that a first resume() enters, and the one it comes from
Context* entered_from = nullptr;

}  // namespace

#if !defined(SIMT_UCONTEXT)

// Pushes the registers that a call must preserve, stores the stack pointer in *from, and the reverse.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");

#endif

Context::~Context() {
  if (stack_) munmap(stack_, guard + stack_size);
}

void Context::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  if (!stack_) {
    void* memory =
        mmap(nullptr, guard + stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, guard, PROT_NONE);
  }
  bottom_ = stack_ + guard;
  size_ = stack_size;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(bottom_, size_);  // an unfinished thread leaves the redzones of its frames
#endif
#if !defined(SIMT_UCONTEXT)
  // Six registers, the address to return to, and a slot that aligns the stack as a call would.
  auto* top = reinterpret_cast<void**>(stack_ + guard + stack_size);
  for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Context::trampoline);
  pointer_ = top - 8;
#else
  getcontext(&place_);
  place_.uc_stack.ss_sp = stack_ + guard;
  place_.uc_stack.ss_size = stack_size;
  place_.uc_link = nullptr;
  makecontext(&place_, &Context::trampoline, 0);
#endif
}

void Context::trampoline() {
  Context* self = entered;
#if defined(SIMT_ASAN)
  // Reports the bounds of the stack that was left: for the program's own stack there is no other way.
  __sanitizer_finish_switch_fiber(nullptr, &entered_from->bottom_, &entered_from->size_);
#endif
  self->entry_(self->argument_);
  std::abort();
}

void Context::switch_to(Context& other, bool last) {
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, other.bottom_, other.size_);
#else
  (void)last;
#endif
#if !defined(SIMT_UCONTEXT)
  simt_switch(&pointer_, other.pointer_);
#else
  swapcontext(&place_, &other.place_);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Context::resume(Context& home) {
  entered = this;
  entered_from = &home;
  home.switch_to(*this, false);
}

void Context::leave(Context& home, bool last) { switch_to(home, last); }

}  // namespace simt
