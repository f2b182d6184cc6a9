// Runs a block of CUDA threads on one CPU thread, as fibers that switch at barriers and at the operations of a warp.
//
// Detected: accesses out of bounds (with AddressSanitizer; dynamic shared memory has its exact size), a missing barrier
// (the result changes with the order of the threads), a barrier that not all threads reach, a missing wait for an
// asynchronous copy or product. Not detected: races between warps that no order of whole threads reveals, races between
// blocks, the rounding of tensor cores.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace host_cuda {

struct Index {
  unsigned x, y, z;
};

// Orders in which the threads of a block run between barriers.
enum class Order { forward, reverse, shuffled };
void set_order(Order order, unsigned seed);

// Run `body` in each thread of each block, one block after another.
// Throws std::runtime_error if not all threads reach a barrier.
void run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& body);

// Indices and sizes of the running thread.
Index thread_index();
Index block_index();
Index block_dim();
Index grid_dim();
void* dynamic_shared();
unsigned lane();

// End the launch: run() throws an exception with this message.
void fail(const char* what);

void block_barrier();
void warp_barrier();
// Arrive at one of 16 barriers; the last of `threads` threads releases those that wait.
void named_barrier(int barrier, int threads, bool wait);
int block_any(int predicate);

constexpr size_t kSlotBytes = 32;
// Show a value of at most kSlotBytes to the other lanes of the warp. All lanes call it, and it waits for all of them.
void show(const void* value, size_t bytes);
// Return the value that a lane has shown. It is valid until this thread shows the next.
const void* shown_by(unsigned lane);

// Asynchronous copies of 16 bytes, which arrive when the thread waits for their group and not before.
void copy_later(void* to, const void* from);
void end_copy_group();
void wait_for_copies(size_t groups_left);

// Operations that take place when the thread waits for their group and not before.
void do_later(std::function<void()> operation);
void end_operation_group();
void do_now(size_t groups_left);

}  // namespace host_cuda
