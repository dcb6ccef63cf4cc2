// A CUDA block on one CPU thread: every CUDA thread is a fiber, and barriers and warp collectives are where
// fibers wait for each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/types.h"

namespace fi::emulation {

// A cp.async that was issued and has not arrived yet.
struct Copy {
  void* smem;
  const void* source;  // null: zeros
  int bytes;
};

// Where threads meet: complete when `expected` have arrived. Two sets of slots, because a thread may reach
// the next meeting before the slowest has read this one's.
struct Meeting {
  uint64_t generation = 0;
  int arrived = 0;
  const char* what = nullptr;  // the operation of the first to arrive
  alignas(16) unsigned char slots[2][32][64];
};

struct Block;

struct Thread {
  Block* block = nullptr;
  uint3 thread_idx;
  int lane, warp;
  void* stack_pointer = nullptr;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // runs again when (*waits_for & waits_mask) != waits_while
  uint64_t waits_mask = 0, waits_while = 0;
  const char* waits_at = "";
  bool spins = false;       // it ran last only to ask again for what it waits for
  uint64_t arrived_at = 0;  // the cluster barrier's generation at this thread's arrival
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> issued;
  int copies_under_way = 0;  // of barrier_arrive_after_copies
};

Thread& current();
uint3 block_idx();
dim3 block_dim();
dim3 grid_dim();

// Meets the lanes of `mask` in this thread's warp; returns what each of them brought, 64 bytes a lane.
const unsigned char (*meet_warp(uint32_t mask, const char* what, const void* value, size_t size))[64];

// Barrier `id` for `threads` threads; 0 threads: all of the block.
void meet_block(int id, int threads, const char* what);

// The same, all of the block at barrier 0; returns how many came with `predicate`.
int block_count(const char* what, bool predicate);

// Lets other threads run once: for spin loops.
void yield();

// Waits while (*word & mask) == value.
void wait_while(const uint64_t* word, uint64_t mask, uint64_t value, const char* what);

// What the hardware does on its own, to this block's shared memory or block `rank`'s of the cluster: as late
// as can be, when no thread can run any more, or somewhat sooner under FI_EMULATION_SEED.
void later(std::function<void()> happen);
void later(std::function<void()> happen, unsigned rank);

[[noreturn]] void fail(const std::string& what);

unsigned char* dynamic_smem();
size_t dynamic_smem_bytes();

// Matrix products see what the copy engine writes at once, what threads write only after a fence of a thread
// that sees it. This is shared memory as they see it; `write` copies what is in the shared memory of block
// `rank` at p.
void fence_smem_for_products();
const unsigned char* smem_of_products();
void write_smem_of_products(unsigned rank, const void* p, size_t bytes);

// What this warp's matrix products are at (emulation/products.h).
struct WarpProducts;
std::shared_ptr<WarpProducts>& warp_products();

// Blocks that run at the same time, and the same place in the shared memory of another of them.
unsigned cluster_size();
unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
void* peer_smem(void* p, unsigned rank);

// Writes where the kernel lies in the library to the file that FI_EMULATION_LAUNCHES names
// (../../launches.py).
void note_launch(const void* kernel);

// `cluster` consecutive blocks of grid.x run together, the rest one after the other.
void run_grid(dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, unsigned cluster = 1);

// Brings a value to the lanes of `mask` and returns the one of lane `source`.
template <class T>
T from_lane(uint32_t mask, const char* what, const T& value, int source) {
  static_assert(sizeof(T) <= 64);
  const auto* slots = meet_warp(mask, what, &value, sizeof(T));
  T result;
  std::memcpy(&result, slots[source & 31], sizeof(T));
  return result;
}

// Folds the values of all lanes in `mask`, in the order of the lanes.
template <class T, class F>
T fold_lanes(uint32_t mask, const char* what, const T& value, T result, const F& f) {
  const auto* slots = meet_warp(mask, what, &value, sizeof(T));
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    T x;
    std::memcpy(&x, slots[lane], sizeof(T));
    result = f(result, x);
  }
  return result;
}

}  // namespace fi::emulation
