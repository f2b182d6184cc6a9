#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace host_cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  Index index;
  unsigned linear;
  int predicate;
  alignas(16) unsigned char slot[kSlotBytes];
  std::vector<std::vector<Copy>> groups;  // the last is still open
  void* sanitizer = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> order;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, &std::free};
  Index grid, dim, index;
  const std::function<void()>* body;
  ucontext_t scheduler;
  std::string failure;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_sanitizer = nullptr;
};

Block* block = nullptr;
Fiber* current = nullptr;
Order thread_order = Order::forward;
unsigned order_seed = 0;

// AddressSanitizer must know of every change of stacks.
void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}

void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
#endif
}

void enter() {
  after_switch(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  (*block->body)();
  current->state = State::done;
  before_switch(nullptr, block->scheduler_stack, block->scheduler_stack_bytes);
  setcontext(&block->scheduler);
}

void wait_as(State state) {
  Fiber* self = current;
  self->state = state;
  before_switch(&self->sanitizer, block->scheduler_stack, block->scheduler_stack_bytes);
  swapcontext(&self->context, &block->scheduler);
  after_switch(self->sanitizer, &block->scheduler_stack, &block->scheduler_stack_bytes);
}

void resume(Fiber& fiber) {
  current = &fiber;
  before_switch(&block->scheduler_sanitizer, fiber.stack.get(), kStackBytes);
  swapcontext(&block->scheduler, &fiber.context);
  after_switch(block->scheduler_sanitizer, nullptr, nullptr);
}

size_t count(size_t first, size_t last, State state) {
  return std::count_if(block->fibers.begin() + first, block->fibers.begin() + last,
                       [&](const Fiber& f) { return f.state == state; });
}

// Lets go whom all have joined; whether there was anyone.
bool release(size_t first, size_t last, State barrier) {
  const size_t waiting = count(first, last, barrier);
  if (waiting == 0 || waiting + count(first, last, State::done) < last - first) return false;
  for (size_t i = first; i < last; ++i)
    if (block->fibers[i].state == barrier) block->fibers[i].state = State::ready;
  return true;
}

void run_block() {
  Block& b = *block;
  const size_t n = b.fibers.size();
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = b.fibers[i];
    f.linear = static_cast<unsigned>(i);
    f.index = {f.linear % b.dim.x, f.linear / b.dim.x % b.dim.y, f.linear / (b.dim.x * b.dim.y)};
    f.state = State::ready;
    f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    for (const unsigned i : b.order)
      if (b.fibers[i].state == State::ready) {
        resume(b.fibers[i]);
        if (!b.failure.empty()) throw std::runtime_error("host_cuda: " + b.failure);
      }
    const size_t done = count(0, n, State::done);
    if (done == n) return;
    bool released = false;
    for (size_t first = 0; first < n; first += kWarp)
      released |= release(first, std::min(n, first + kWarp), State::at_warp_barrier);
    if (count(0, n, State::at_block_barrier) == n) released |= release(0, n, State::at_block_barrier);
    if (!released)
      throw std::runtime_error("host_cuda: a barrier that not all threads reach: " +
                               std::to_string(count(0, n, State::at_block_barrier)) + " of " + std::to_string(n) +
                               " threads wait for the block, " + std::to_string(count(0, n, State::at_warp_barrier)) +
                               " for their warp, " + std::to_string(done) + " have ended");
  }
}

}  // namespace

void set_order(Order order, unsigned seed) { thread_order = order, order_seed = seed; }

void run(Index grid, Index dim, size_t shared_bytes, const std::function<void()>& body) {
  const size_t n = size_t{dim.x} * dim.y * dim.z;
  if (n % kWarp != 0) throw std::runtime_error("host_cuda: blocks of whole warps alone are supported");
  Block b;
  b.fibers = std::vector<Fiber>(n);
  b.grid = grid, b.dim = dim, b.body = &body;
  b.order.resize(n);
  std::iota(b.order.begin(), b.order.end(), 0u);
  if (thread_order == Order::reverse) std::reverse(b.order.begin(), b.order.end());
  if (thread_order == Order::shuffled) std::shuffle(b.order.begin(), b.order.end(), std::mt19937(order_seed));
  block = &b;
  // Its exact size, from an address that is a multiple of 16: one beyond the end is AddressSanitizer's.
  b.shared.reset(static_cast<unsigned char*>(std::malloc(std::max<size_t>(shared_bytes, 1))));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(b.shared.get(), 0xcd, shared_bytes);
        b.index = {x, y, z};
        run_block();
      }
}

Index thread_index() { return current->index; }
Index block_index() { return block->index; }
Index block_dim() { return block->dim; }
Index grid_dim() { return block->grid; }
void* dynamic_shared() { return block->shared.get(); }
unsigned lane() { return current->linear % kWarp; }

void fail(const char* what) {
  block->failure = what;
  wait_as(State::done);  // an exception cannot leave a fiber: the scheduler throws
}

void block_barrier() { wait_as(State::at_block_barrier); }
void warp_barrier() { wait_as(State::at_warp_barrier); }

int block_any(int predicate) {
  current->predicate = predicate;
  block_barrier();
  const bool any = std::any_of(block->fibers.begin(), block->fibers.end(), [](const Fiber& f) { return f.predicate; });
  block_barrier();
  return any;
}

void* own_slot() { return current->slot; }
const void* slot_of(unsigned lane) { return block->fibers[current->linear / kWarp * kWarp + lane].slot; }

void copy_later(void* to, const void* from) {
  std::memset(to, 0xcd, 16);  // so that a read before the wait, also of what lay there, shows
  current->groups.back().push_back({to, from});
}
void end_copy_group() { current->groups.emplace_back(); }

void wait_for_copies(size_t groups_left) {
  auto& groups = current->groups;
  const size_t closed = groups.size() - 1, arrived = closed > groups_left ? closed - groups_left : 0;
  for (size_t g = 0; g < arrived; ++g)
    for (const Copy& copy : groups[g]) copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(arrived));
}

}  // namespace host_cuda
