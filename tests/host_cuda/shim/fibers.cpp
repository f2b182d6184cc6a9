#include "fibers.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "context.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace host_cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, at_named_barrier, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t group;
};

struct Fiber {
  Context context;
  char* stack;
  State state;
  Index index;
  unsigned linear;
  int predicate;
  int named_barrier;
  alignas(16) unsigned char slots[2][kSlotBytes];  // used in turn
  int slot;                                        // the one in use
  std::vector<Copy> copies;
  size_t copy_group;                                                 // the open one
  std::vector<std::pair<size_t, std::function<void()>>> operations;  // with their groups
  size_t operation_group;                                            // the open one
  void* sanitizer = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> order;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, &std::free};
  Index grid, dim, index;
  const std::function<void()>* body;
  Context scheduler;
  std::string failure;
  std::array<int, 16> arrived;  // at the named barriers
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_sanitizer = nullptr;
};

// The stacks of all launches, because allocating them takes longer than most kernels.
std::vector<std::unique_ptr<char[]>> stacks;
Block* block = nullptr;
Fiber* current = nullptr;
Order thread_order = Order::forward;
unsigned order_seed = 0;

// AddressSanitizer must be told about every switch of stacks.
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
  current->context.switch_to(block->scheduler);
}

void wait_as(State state) {
  Fiber* self = current;
  self->state = state;
  before_switch(&self->sanitizer, block->scheduler_stack, block->scheduler_stack_bytes);
  self->context.switch_to(block->scheduler);
  after_switch(self->sanitizer, &block->scheduler_stack, &block->scheduler_stack_bytes);
}

void resume(Fiber& fiber) {
  current = &fiber;
  before_switch(&block->scheduler_sanitizer, fiber.stack, kStackBytes);
  block->scheduler.switch_to(fiber.context);
  after_switch(block->scheduler_sanitizer, nullptr, nullptr);
}

size_t count(size_t first, size_t last, State state) {
  return std::count_if(block->fibers.begin() + first, block->fibers.begin() + last,
                       [&](const Fiber& f) { return f.state == state; });
}

// Release the threads first .. last from a barrier that all of them have reached; return true if any was released.
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
  b.arrived = {};
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = b.fibers[i];
    f.linear = static_cast<unsigned>(i);
    f.index = {f.linear % b.dim.x, f.linear / b.dim.x % b.dim.y, f.linear / (b.dim.x * b.dim.y)};
    f.state = State::ready;
    f.slot = 0;
    f.copies.clear(), f.copy_group = 0;
    f.operations.clear(), f.operation_group = 0;
    f.context.prepare(f.stack, kStackBytes, enter);
  }
  for (;;) {
    for (const unsigned i : b.order)
      if (b.fibers[i].state == State::ready) {
        resume(b.fibers[i]);
        if (!b.failure.empty()) throw std::runtime_error("host_cuda: " + b.failure);
      }
    const size_t done = count(0, n, State::done);
    if (done == n) return;
    bool released = count(0, n, State::ready) > 0;  // from a named barrier
    for (size_t first = 0; first < n; first += kWarp)
      released |= release(first, std::min(n, first + kWarp), State::at_warp_barrier);
    if (count(0, n, State::at_block_barrier) == n) released |= release(0, n, State::at_block_barrier);
    if (!released)
      throw std::runtime_error("host_cuda: a barrier that not all threads reach: " +
                               std::to_string(count(0, n, State::at_block_barrier)) + " of " + std::to_string(n) +
                               " threads wait for the block, " + std::to_string(count(0, n, State::at_warp_barrier)) +
                               " for their warp, " + std::to_string(count(0, n, State::at_named_barrier)) +
                               " at another barrier, " + std::to_string(done) + " have ended");
  }
}

}  // namespace

void set_order(Order order, unsigned seed) { thread_order = order, order_seed = seed; }

void run(Index grid, Index dim, size_t shared_bytes, const std::function<void()>& body) {
  const size_t n = size_t{dim.x} * dim.y * dim.z;
  if (n % kWarp != 0) throw std::runtime_error("host_cuda: blocks of whole warps alone are supported");
  Block b;
  b.fibers = std::vector<Fiber>(n);
  while (stacks.size() < n) stacks.emplace_back(new char[kStackBytes]);
  for (size_t i = 0; i < n; ++i) b.fibers[i].stack = stacks[i].get();
  b.grid = grid, b.dim = dim, b.body = &body;
  b.order.resize(n);
  std::iota(b.order.begin(), b.order.end(), 0u);
  if (thread_order == Order::reverse) std::reverse(b.order.begin(), b.order.end());
  if (thread_order == Order::shuffled) std::shuffle(b.order.begin(), b.order.end(), std::mt19937(order_seed));
  block = &b;
  // Its exact size, from an address that is a multiple of 1024: one beyond the end is AddressSanitizer's.
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  b.shared.reset(static_cast<unsigned char*>(shared));
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

void named_barrier(int barrier, int threads, bool wait) {
  int& arrived = block->arrived.at(barrier);
  if (++arrived < threads) {
    current->named_barrier = barrier;
    if (wait) wait_as(State::at_named_barrier);
    return;
  }
  arrived = 0;
  for (Fiber& f : block->fibers)
    if (f.state == State::at_named_barrier && f.named_barrier == barrier) f.state = State::ready;
}

int block_any(int predicate) {
  current->predicate = predicate;
  block_barrier();
  const bool any = std::any_of(block->fibers.begin(), block->fibers.end(), [](const Fiber& f) { return f.predicate; });
  block_barrier();
  return any;
}

void show(const void* value, size_t bytes) {
  current->slot = 1 - current->slot;  // lanes that are behind still read the other one
  std::memcpy(current->slots[current->slot], value, bytes);
  warp_barrier();
}
const void* shown_by(unsigned lane) {
  return block->fibers[current->linear / kWarp * kWarp + lane].slots[current->slot];
}

void copy_later(void* to, const void* from) {
  std::memset(to, 0xcd, 16);  // so that a read before the wait, also of the previous contents, shows
  current->copies.push_back({to, from, current->copy_group});
}
void end_copy_group() { ++current->copy_group; }

void wait_for_copies(size_t groups_left) {
  auto& copies = current->copies;
  const auto end = std::find_if(copies.begin(), copies.end(),
                                [&](const Copy& copy) { return copy.group + groups_left >= current->copy_group; });
  std::for_each(copies.begin(), end, [](const Copy& copy) {
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  });
  copies.erase(copies.begin(), end);
}

void do_later(std::function<void()> operation) {
  current->operations.emplace_back(current->operation_group, std::move(operation));
}
void end_operation_group() { ++current->operation_group; }

void do_now(size_t groups_left) {
  auto& operations = current->operations;
  size_t done = 0;
  for (; done < operations.size() && operations[done].first + groups_left < current->operation_group; ++done)
    operations[done].second();
  operations.erase(operations.begin(), operations.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace host_cuda
