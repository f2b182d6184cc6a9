// Switches between stacks; included by fibers.cpp alone. On x86-64 a switch is twenty instructions; elsewhere it is
// swapcontext, which makes a system call and, under AddressSanitizer, unpoisons the whole stack.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_cuda {

#if defined(__x86_64__)

// Push the callee-saved registers, store the stack pointer in *from, and continue where `to` was stored.
extern "C" void host_cuda_switch(void** from, void* to);

asm(R"(
.text
.hidden host_cuda_switch
.globl host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size host_cuda_switch, . - host_cuda_switch
)");

class Context {
 public:
  // Let the next switch to this context call `entry`, which never returns, on the given stack.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<size_t>(stack) + bytes) / 16 * 16);
    *--top = nullptr;  // the return address of `entry`
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(Context& other) { host_cuda_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace host_cuda
