// Scratch memory of an attention call, and the handing out of its tasks to workers that have buffers.
#pragma once

#include "fi/attention.h"

namespace fi::FI_ISA {

FI_INLINE constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
FI_INLINE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Hands out pieces of one allocation, each 64-byte aligned; with base null it only adds up the size.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(E)), 64);
    return p;
  }
};

template <class E>
FI_INLINE E* allocate(const Scratch& scratch, int64_t count) {
  return static_cast<E*>(scratch.allocate(scratch.context, round_up(count * int64_t(sizeof(E)), 64) + 64));
}

// Tasks of one kind. A worker with `bytes` of memory calls work(memory, take); take() gives it its next
// task's number, -1 when there are no more.
template <class F>
struct Phase {
  int64_t count, bytes;
  F work;
};

template <class F>
Phase(int64_t, int64_t, F) -> Phase<F>;

// All tasks of the phases, one at a time, in order: nobody waits between two phases.
template <class... F>
void run_phases(const Scratch& scratch, const Parallel& parallel, const Phase<F>&... phases) {
  const int64_t count = (phases.count + ... + 0);
  const int64_t workers = parallel.num_threads < count ? parallel.num_threads : count;
  if (workers <= 0) return;
  int64_t bytes = 0;
  ((bytes = phases.count && phases.bytes > bytes ? phases.bytes : bytes), ...);
  std::atomic<int64_t> next{0};
  auto work = [&, memory = allocate<char>(scratch, bytes * workers)](int64_t worker) {
    int64_t task = next.fetch_add(1, std::memory_order_relaxed), first = 0;
    auto run = [&](const auto& phase) {
      const int64_t end = first + phase.count;
      if (task < end) {
        int64_t mine = task;  // the one to hand out; taken: -1
        phase.work(memory + worker * bytes, [&] {
          task = mine >= 0 ? mine : next.fetch_add(1, std::memory_order_relaxed);
          mine = -1;
          return task < end ? task - first : int64_t{-1};
        });
      }
      first = end;
    };
    (run(phases), ...);
  };
  if (workers == 1) {
    work(0);
  } else {
    auto body = [](int64_t worker, void* context) { (*static_cast<decltype(work)*>(context))(worker); };
    parallel.launch(workers, body, &work);
  }
}

}  // namespace fi::FI_ISA
