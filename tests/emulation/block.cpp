// The emulator's scheduler: fibers, meetings, and running a grid block by block.
#include "emulation/block.h"

#include "emulation/mbarrier.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
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
  size_t smem_bytes;
  std::vector<unsigned char> products_smem;  // shared memory as products see it, from its first use on
  bool fenced = false;                       // by the warp that runs: not in products_smem yet
  std::vector<Thread> threads;
  std::vector<std::map<uint32_t, Meeting>> warps;       // by mask
  std::vector<std::shared_ptr<WarpProducts>> products;  // by warp
  std::vector<uint64_t> rests_until;                    // by warp: the round
  std::map<int, Barrier> barriers;
  int alive = 0;
  int awaited = 0;  // what the hardware is still to do to its shared memory
};

namespace {

// What the hardware will do on its own.
struct Event {
  Block* to;
  std::function<void()> happen;
};

// Blocks that run together: one, or a thread block cluster.
struct Cluster {
  std::vector<Block> blocks;
  const std::function<void()>* body;
  Barrier barrier;
  int alive = 0;
  std::vector<Event> events;  // in the order in which they were asked for
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

void to_scheduler_and_back() {
  to_scheduler();
  if (block->cluster->error) std::rethrow_exception(block->cluster->error);
}

void wait_while(const uint64_t* generation, uint64_t value, const char* what) {
  emulation::wait_while(generation, ~uint64_t{0}, value, what);
}

void set_error(Cluster& c, const std::string& what) {
  if (!c.error) c.error = std::make_exception_ptr(std::runtime_error("fi_ops emulation: " + what));
}

void fiber_main() {
  try {
    (*block->cluster->body)();
  } catch (...) {
    if (!block->cluster->error) block->cluster->error = std::current_exception();
  }
  thread->done = true;
  --block->cluster->alive;
  if (--block->alive == 0 && block->awaited > 0)
    set_error(*block->cluster, "a block ended while copies to its shared memory were under way");
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

// Where a thread is, for the message of a deadlock.
std::string place_of(const Thread& t) {
  const auto* word = reinterpret_cast<const unsigned char*>(t.waits_for);
  std::string text = t.spins ? "spins" : std::string("waits at ") + t.waits_at;
  if (!t.spins && word >= t.block->smem && word < t.block->smem + t.block->smem_bytes)
    text += " of byte " + std::to_string(word - t.block->smem) + " (" + describe_mbarrier(*t.waits_for) + ")";
  if (t.block->cluster->blocks.size() > 1)
    text += " in block " + std::to_string(t.block->rank) + " of its cluster";
  return text;
}

std::string deadlock(const std::vector<Thread*>& threads) {
  std::map<std::string, std::pair<int, const Thread*>> places;  // how many are there, and the first
  for (const Thread* t : threads) {
    if (t->done) continue;
    auto& [count, first] = places[place_of(*t)];
    if (count++ == 0 || t < first) first = t;
  }
  std::string text = "deadlock:";
  for (const auto& [place, who] : places) {
    text += " " + name_of(*who.second);
    if (who.first > 1) text += " and " + std::to_string(who.first - 1) + " more";
    text += " " + place + ";";
  }
  return text;
}

std::vector<unsigned char>& products_smem(Block& b) {
  if (b.products_smem.empty()) b.products_smem.resize(b.smem_bytes, 0xff);
  return b.products_smem;
}

void show_to_products(Block& b) {
  if (b.fenced) std::memcpy(products_smem(b).data(), b.smem, b.smem_bytes);
  b.fenced = false;
}

void let_happen(Cluster& c, size_t i) {
  const Event event = std::move(c.events[i]);
  c.events.erase(c.events.begin() + int64_t(i));
  --event.to->awaited;
  if (thread) show_to_products(*thread->block);
  thread = nullptr;
  block = event.to;
  try {
    if (event.to->alive == 0) throw std::runtime_error("fi_ops emulation: a copy to a block that has ended");
    event.happen();
  } catch (...) {
    if (!c.error) c.error = std::current_exception();
  }
}

// Another order of the threads; what the hardware does at some time; and warps that fall behind the others.
void shuffle(Cluster& c, std::vector<Thread*>& turns, uint64_t round) {
  constexpr unsigned kRestEvery = 16, kLongestRest = 256;  // rounds
  std::shuffle(turns.begin(), turns.end(), order);
  if (!c.events.empty() && order() % 2 == 0) let_happen(c, order() % c.events.size());
  if (order() % kRestEvery == 0) {
    Block& b = c.blocks[order() % c.blocks.size()];
    b.rests_until[order() % b.warps.size()] = round + order() % kLongestRest;
  }
}

void run_cluster(Cluster& c, bool shuffled) {
  const size_t block_size = size_t(c.blocks[0].dim.x) * c.blocks[0].dim.y * c.blocks[0].dim.z;
  std::vector<Thread*> turns;
  for (Block& b : c.blocks) {
    b.threads.resize(block_size);
    b.warps.resize((block_size + 31) / 32);
    b.products.resize(b.warps.size());
    b.rests_until.resize(b.warps.size());
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
  constexpr int kMostIdleRounds = 10000;  // in which threads only spin
  int idle_rounds = 0;
  for (uint64_t round = 1; c.alive > 0; ++round) {
    bool moved = false, spun = false, rested = false;
    if (shuffled) shuffle(c, turns, round);
    for (Thread* t : turns) {
      if (t->done || (t->waits_for && (*t->waits_for & t->waits_mask) == t->waits_while && !c.error))
        continue;
      if (t->block->rests_until[t->warp] > round && !c.error) {
        rested = true;
        continue;
      }
      if (thread && (t->block != block || t->warp != thread->warp)) show_to_products(*block);
      t->waits_for = nullptr;
      t->spins = false;
      thread = t;
      block = t->block;
      fi_emulation_switch(&scheduler_stack, t->stack_pointer);
      (t->spins ? spun : moved) = true;
    }
    if (moved) {
      idle_rounds = 0;
    } else if (rested && (c.events.empty() || order() % 2 == 0)) {
      for (Block& b : c.blocks) std::fill(b.rests_until.begin(), b.rests_until.end(), 0);
    } else if (!c.events.empty()) {
      let_happen(c, shuffled ? order() % c.events.size() : 0);
    } else if (!spun || ++idle_rounds > kMostIdleRounds) {
      set_error(c, deadlock(turns));
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
size_t dynamic_smem_bytes() { return block->smem_bytes; }

void fence_smem_for_products() { block->fenced = true; }

const unsigned char* smem_of_products() {
  show_to_products(*block);
  return products_smem(*block).data();
}

void write_smem_of_products(unsigned rank, const void* p, size_t bytes) {
  Block& b = block->cluster->blocks[rank];
  const size_t offset = static_cast<const unsigned char*>(p) - b.smem;
  std::memcpy(products_smem(b).data() + offset, p, bytes);
}

std::shared_ptr<WarpProducts>& warp_products() { return block->products[thread->warp]; }

void wait_while(const uint64_t* word, uint64_t mask, uint64_t value, const char* what) {
  thread->waits_for = word;
  thread->waits_mask = mask;
  thread->waits_while = value;
  thread->waits_at = what;
  to_scheduler_and_back();
}

void later(std::function<void()> happen) { later(std::move(happen), block->rank); }
void later(std::function<void()> happen, unsigned rank) {
  if (rank >= cluster_size()) fail("a copy to a block that is not in the cluster");
  Block* const to = &block->cluster->blocks[rank];
  ++to->awaited;
  block->cluster->events.push_back({to, std::move(happen)});
}

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
  throw std::runtime_error("fi_ops emulation: " + (thread ? name_of(*thread) + ": " : "") + what);
}

void yield() {
  thread->spins = true;
  to_scheduler_and_back();
}

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

void note_launch(const void* kernel) {
  const char* path = std::getenv("FI_EMULATION_LAUNCHES");
  Dl_info library;
  if (path == nullptr || *path == '\0' || dladdr(kernel, &library) == 0) return;
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  std::ofstream(path, std::ios::app) << library.dli_fname << ' ' << offset << '\n';
}

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
      b.smem_bytes = rounded;
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
