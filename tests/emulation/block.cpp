// The emulator's scheduler: fibers, meetings, and running a grid block by block.
#include "emulation/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <random>

#ifndef __x86_64__
#  error "the emulator's fibers are written for x86-64"
#endif

// Saves the callee-saved registers and the stack pointer to *from, continues at `to`.
extern "C" void fi_emulation_switch(void** from, void* to);
asm(R"(
.text
.hidden fi_emulation_switch
.globl fi_emulation_switch
.type fi_emulation_switch,@function
fi_emulation_switch:
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
.size fi_emulation_switch,.-fi_emulation_switch
)");

namespace fi::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPage = 4096;

struct Barrier {
  uint64_t generation = 0;
  int arrived = 0, expected = 0, count = 0, result = 0;
  const char* what = nullptr;
};

struct Cluster;

}  // namespace

struct Block {
  Cluster* cluster;
  unsigned rank;
  uint3 index;
  dim3 dim, grid;
  unsigned char* smem;
  std::vector<Thread> threads;
  std::vector<std::map<uint32_t, Meeting>> warps;  // by mask
  std::map<int, Barrier> barriers;
  int alive = 0;
};

namespace {

// Blocks that run together: one, or a thread block cluster.
struct Cluster {
  std::vector<Block> blocks;
  const std::function<void()>* body;
  Barrier barrier;
  int alive = 0;
  std::exception_ptr error;
};

Block* block = nullptr;  // the current thread's
Thread* thread = nullptr;
void* scheduler_stack = nullptr;
std::vector<char*> stacks;
std::minstd_rand order;

std::string name_of(const Thread& t) {
  return "thread (" + std::to_string(t.thread_idx.x) + ", " + std::to_string(t.thread_idx.y) + ", " +
         std::to_string(t.thread_idx.z) + ")";
}

void to_scheduler() { fi_emulation_switch(&thread->stack_pointer, scheduler_stack); }

void wait_while(const uint64_t* generation, uint64_t value, const char* what) {
  thread->waits_for = generation;
  thread->waits_while = value;
  thread->waits_at = what;
  to_scheduler();
  if (block->cluster->error) std::rethrow_exception(block->cluster->error);
}

void fiber_main() {
  try {
    (*block->cluster->body)();
  } catch (...) {
    if (!block->cluster->error) block->cluster->error = std::current_exception();
  }
  thread->done = true;
  --block->alive;
  --block->cluster->alive;
  to_scheduler();
  __builtin_unreachable();
}

char* stack_of(size_t i) {
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kPage, PROT_NONE);
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

void prepare(Thread& t, size_t i) {
  auto** top = reinterpret_cast<void**>(stack_of(i) + kStackBytes);
  *--top = nullptr;  // as after a call: the stack is 8 off 16 at the function's first instruction
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  t.stack_pointer = top;
}

void run_cluster(Cluster& c, bool shuffled) {
  const size_t block_size = size_t(c.blocks[0].dim.x) * c.blocks[0].dim.y * c.blocks[0].dim.z;
  std::vector<Thread*> turns;
  for (Block& b : c.blocks) {
    b.threads.resize(block_size);
    b.warps.resize((block_size + 31) / 32);
    b.alive = int(block_size);
    for (size_t i = 0; i < block_size; ++i) {
      Thread& t = b.threads[i];
      t.block = &b;
      t.thread_idx = {unsigned(i % b.dim.x), unsigned(i / b.dim.x % b.dim.y),
                      unsigned(i / b.dim.x / b.dim.y)};
      t.lane = int(i % 32);
      t.warp = int(i / 32);
      prepare(t, turns.size());
      turns.push_back(&t);
    }
  }
  c.alive = int(turns.size());
  while (c.alive > 0) {
    bool moved = false;
    if (shuffled) std::shuffle(turns.begin(), turns.end(), order);
    for (Thread* t : turns) {
      if (t->done || (t->waits_for && *t->waits_for == t->waits_while && !c.error)) continue;
      t->waits_for = nullptr;
      thread = t;
      block = t->block;
      fi_emulation_switch(&scheduler_stack, t->stack_pointer);
      moved = true;
    }
    if (!moved) {
      std::string text = "deadlock:";
      int listed = 0;
      for (const Thread* t : turns)
        if (!t->done && listed++ < 4) text += " " + name_of(*t) + " waits at " + t->waits_at + ";";
      c.error = std::make_exception_ptr(std::runtime_error("fi_ops emulation: " + text));
    }
  }
  thread = nullptr;
  block = nullptr;
  if (c.error) std::rethrow_exception(c.error);
}

}  // namespace

Thread& current() { return *thread; }
uint3 block_idx() { return block->index; }
dim3 block_dim() { return block->dim; }
dim3 grid_dim() { return block->grid; }
unsigned char* dynamic_smem() { return block->smem; }

unsigned cluster_size() { return unsigned(block->cluster->blocks.size()); }
unsigned cluster_rank() { return block->rank; }

void* peer_smem(void* p, unsigned rank) {
  if (rank >= cluster_size()) fail("peer_smem: no block of that rank");
  if (block->cluster->blocks[rank].alive == 0) fail("peer_smem: that block has ended");
  return static_cast<unsigned char*>(p) - block->smem + block->cluster->blocks[rank].smem;
}

void cluster_arrive() {
  Cluster& c = *block->cluster;
  thread->arrived_at = c.barrier.generation;
  if (++c.barrier.arrived == c.alive) {
    c.barrier.arrived = 0;
    ++c.barrier.generation;
  }
}

void cluster_wait() {
  const Barrier& barrier = block->cluster->barrier;
  if (barrier.generation == thread->arrived_at)
    wait_while(&barrier.generation, thread->arrived_at, "cluster_wait");
}

void fail(const std::string& what) {
  throw std::runtime_error("fi_ops emulation: " + name_of(*thread) + ": " + what);
}

void yield() { to_scheduler(); }

const unsigned char (*meet_warp(uint32_t mask, const char* what, const void* value, size_t size))[64] {
  if (!(mask >> thread->lane & 1)) fail(std::string(what) + ": the mask leaves out the caller");
  Meeting& m = block->warps[thread->warp][mask];
  if (m.arrived == 0) m.what = what;
  if (std::strcmp(m.what, what) != 0) fail(std::string(what) + " meets " + m.what + " in one warp");
  int expected = 0;
  for (size_t i = size_t(thread->warp) * 32;
       i < std::min(block->threads.size(), size_t(thread->warp + 1) * 32); ++i)
    expected += !block->threads[i].done && (mask >> block->threads[i].lane & 1);
  const int side = int(m.generation & 1);
  std::memcpy(m.slots[side][thread->lane], value, size);
  if (++m.arrived == expected) {
    m.arrived = 0;
    ++m.generation;
  } else {
    wait_while(&m.generation, m.generation, what);
  }
  return m.slots[side];
}

static Barrier& meet_at_barrier(int id, int threads, const char* what, bool predicate) {
  Barrier& b = block->barriers[id];
  const int expected = threads > 0 ? threads : block->alive;
  if (b.arrived == 0) b.what = what, b.expected = expected, b.count = 0;
  if (std::strcmp(b.what, what) != 0) fail(std::string(what) + " meets " + b.what + " at one barrier");
  b.count += predicate;
  if (++b.arrived == expected) {
    b.arrived = 0;
    b.result = b.count;
    ++b.generation;
  } else {
    wait_while(&b.generation, b.generation, what);
  }
  return b;
}

void meet_block(int id, int threads, const char* what) { meet_at_barrier(id, threads, what, false); }

int block_count(const char* what, bool predicate) { return meet_at_barrier(0, 0, what, predicate).result; }

void run_grid(dim3 grid, dim3 dim, size_t smem_bytes, const std::function<void()>& body, unsigned cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const char* text = std::getenv("FI_EMULATION_SEED");
  const int seed = text ? std::atoi(text) : 0;
  if (size_t(dim.x) * dim.y * dim.z > 1024)
    throw std::runtime_error("fi_ops emulation: more than 1024 threads a block");
  if (smem_bytes > 227 * 1024)
    throw std::runtime_error("fi_ops emulation: more than 227 KB of shared memory");
  if (grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("fi_ops emulation: grid.y or grid.z above 65535");
  order.seed(unsigned(seed));

  if (cluster == 0 || cluster > 8 || grid.x % cluster != 0)
    throw std::runtime_error("fi_ops emulation: grid.x is no multiple of the cluster, or that is above 8");

  // The end of shared memory lies at a page without access: a write past it is a fault, not a silent success.
  const size_t rounded = (smem_bytes + 1023) / 1024 * 1024, pages = (rounded + kPage - 1) / kPage * kPage;
  auto* area = static_cast<unsigned char*>(
      mmap(nullptr, cluster * (pages + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (unsigned rank = 0; rank < cluster; ++rank)
    mprotect(area + rank * (pages + kPage) + pages, kPage, PROT_NONE);

  std::vector<size_t> clusters(size_t(grid.x) / cluster * grid.y * grid.z);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  if (seed != 0) std::shuffle(clusters.begin(), clusters.end(), order);
  std::exception_ptr error;
  for (size_t i : clusters) {
    Cluster c;
    c.body = &body;
    c.blocks.resize(cluster);
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& b = c.blocks[rank];
      const size_t at = i * cluster + rank;
      b.cluster = &c;
      b.rank = rank;
      b.index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
      b.dim = dim;
      b.grid = grid;
      b.smem = area + rank * (pages + kPage) + pages - rounded;
      // NaN in every float type: memory that is read must have been written
      std::memset(b.smem, 0xff, rounded);
    }
    try {
      run_cluster(c, seed != 0);
    } catch (...) {
      error = std::current_exception();
      break;
    }
  }
  munmap(area, cluster * (pages + kPage));
  if (error) std::rethrow_exception(error);
}

}  // namespace fi::emulation
