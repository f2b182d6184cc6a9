// A block of CUDA threads on one CPU thread: a fiber each, switched at barriers and at what a warp does together.
//
// What it finds: reads and writes out of bounds (with AddressSanitizer; dynamic shared memory has its exact size), a
// missing barrier (with another order of threads the result changes), a barrier that not all threads reach, a missing
// wait for an asynchronous copy. What it cannot: races between warps that any order of whole threads hides, races
// between blocks, the rounding of tensor cores, speed.
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

// Runs `body` in each thread of each block, one block after another.
// Throws std::runtime_error where a barrier is not reached by all threads.
void run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& body);

// Of the thread that is running.
Index thread_index();
Index block_index();
Index block_dim();
Index grid_dim();
void* dynamic_shared();
unsigned lane();

// Ends the launch with an exception from run().
void fail(const char* what);

void block_barrier();
void warp_barrier();
int block_any(int predicate);

constexpr size_t kSlotBytes = 32;
// Show a value of at most kSlotBytes to the other lanes of the warp. All lanes call it, and it waits for all of them.
void show(const void* value, size_t bytes);
// Return the value that a lane has shown. It is valid until this thread shows the next.
const void* shown_by(unsigned lane);

// Asynchronous copies of 16 bytes: they arrive when the thread waits for their group, not before.
void copy_later(void* to, const void* from);
void end_copy_group();
void wait_for_copies(size_t groups_left);

}  // namespace host_cuda
