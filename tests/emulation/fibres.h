// Fibres: stacks that one operating-system thread runs in turns. Each unfinished CUDA thread of a block owns one.
//
// A fibre is entered once through makecontext; every later switch is _setjmp/_longjmp, because swapcontext makes two
// system calls per switch. The address sanitizer is told about each switch, so its stack bounds stay right.
// Build with -U_FORTIFY_SOURCE: the fortified longjmp rejects jumps between stacks.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

class Fibre {
 public:
  // The stack of the caller, which becomes a fibre by switching away from it.
  Fibre() : started_(true) {}

  // A stack of its own on which `entry` starts at the first switch. `entry` calls arrive() first and never returns.
  explicit Fibre(void (*entry)()) : guard_bytes_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* const memory = mmap(nullptr, guard_bytes_ + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, guard_bytes_, PROT_NONE);
    stack_ = mapping_ + guard_bytes_;
    stack_bytes_ = kStackBytes;
    getcontext(&start_);
    start_.uc_stack.ss_sp = mapping_ + guard_bytes_;
    start_.uc_stack.ss_size = kStackBytes;
    start_.uc_link = nullptr;
    makecontext(&start_, entry, 0);
  }

  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The fibre may be abandoned in the middle of a kernel, so red zones of its frames may still be marked.
  ~Fibre() {
    if (!mapping_) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(mapping_ + guard_bytes_, kStackBytes);
#endif
    munmap(mapping_, guard_bytes_ + kStackBytes);
  }

  // Returns when some other fibre switches back to this one.
  __attribute__((noinline)) void switch_to(Fibre& next) {
    next.previous_ = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.stack_bytes_);
#endif
    if (_setjmp(registers_) == 0) {
      if (next.started_) _longjmp(next.registers_, 1);
      next.started_ = true;
      setcontext(&next.start_);
    }
    arrive();
  }

  // Ends the switch on the new stack; tells the fibre just left where its stack lies (the caller's is not known
  // before).
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &previous_->stack_, &previous_->stack_bytes_);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kStackBytes = 512 * 1024;
#else
  static constexpr std::size_t kStackBytes = 128 * 1024;
#endif

  jmp_buf registers_;
  ucontext_t start_;
  bool started_ = false;
  std::size_t guard_bytes_ = 0;
  char* mapping_ = nullptr;
  const void* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
  Fibre* previous_ = nullptr;
};

}  // namespace cuda_emulation
