// Torch-free handing out of tasks. What a task is must follow from shapes alone, never from the number of
// threads, so that results don't depend on it.
#pragma once

#include <atomic>
#include <cstdint>

namespace fi {

struct Parallel {
  // Calls body(worker, context) once for each worker in [0, workers), at the same time where threads allow.
  void (*launch)(int64_t workers, void (*body)(int64_t worker, void* context), void* context);
  int64_t num_threads;
};

}  // namespace fi

#ifdef FI_ISA
namespace fi::FI_ISA {

// Runs f(task) for task in [0, num_tasks) on the threads of `parallel`, handed out in order, one at a time.
template <class F>
void for_each_task(const Parallel& parallel, int64_t num_tasks, const F& f) {
  if (num_tasks <= 1 || parallel.num_threads <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task);
    return;
  }
  struct Context {
    const F* f;
    int64_t num_tasks;
    std::atomic<int64_t> next;
  } context{&f, num_tasks, {0}};
  auto body = [](int64_t, void* p) {
    auto* c = static_cast<Context*>(p);
    for (;;) {
      int64_t task = c->next.fetch_add(1, std::memory_order_relaxed);
      if (task >= c->num_tasks) return;
      (*c->f)(task);
    }
  };
  int64_t workers = num_tasks < parallel.num_threads ? num_tasks : parallel.num_threads;
  parallel.launch(workers, body, &context);
}

// Like for_each_task over rows, in tasks of `rows_per_task` neighbours: f(begin, end).
template <class F>
void for_each_block(const Parallel& parallel, int64_t num_rows, int64_t rows_per_task, const F& f) {
  if (rows_per_task < 1) rows_per_task = 1;
  int64_t num_tasks = (num_rows + rows_per_task - 1) / rows_per_task;
  for_each_task(parallel, num_tasks, [&](int64_t task) {
    int64_t begin = task * rows_per_task;
    int64_t end = begin + rows_per_task < num_rows ? begin + rows_per_task : num_rows;
    f(begin, end);
  });
}

}  // namespace fi::FI_ISA
#endif
