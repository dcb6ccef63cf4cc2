// Where the rows of a tile of K or V lie: one stride apart, or each at an address of its own (pages). Kernels
// that read rows in place take either.
#pragma once

#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

template <class T>
struct StridedRows {
  const char* base = nullptr;
  int64_t stride = 0;  // bytes

  FI_HD const T* operator[](int64_t j) const { return reinterpret_cast<const T*>(base + j * stride); }
  FI_HD StridedRows shifted(int64_t bytes) const { return {base + bytes, stride}; }
  FI_HD StridedRows from(int64_t j) const { return {base + j * stride, stride}; }
  FI_HD StridedRows columns(int64_t d) const { return shifted(d * int64_t(sizeof(T))); }
};

template <class T>
struct PointerRows {
  const char* const* rows = nullptr;
  int64_t offset = 0;  // bytes

  FI_HD const T* operator[](int64_t j) const { return reinterpret_cast<const T*>(rows[j] + offset); }
  FI_HD PointerRows shifted(int64_t bytes) const { return {rows, offset + bytes}; }
  FI_HD PointerRows from(int64_t j) const { return {rows + j, offset}; }
  FI_HD PointerRows columns(int64_t d) const { return shifted(d * int64_t(sizeof(T))); }
};

// Rows to prefetch, line by line and by one instruction: the hardware follows the addresses of an
// instruction, so two that take every second line, or lines in another order, are 10 to 25% slower.
template <class Rows>
struct NextRows {
  Rows rows;
  int64_t bytes;  // of a row; 0: nothing to prefetch

  FI_HD void prefetch(int64_t j) const {
    const auto* p = reinterpret_cast<const char*>(rows[j]);
#pragma GCC unroll 1
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
  }
};

// One of them every so many steps of a loop: a burst fills the core's queue of misses, and after it memory
// has nothing to do.
template <class Rows>
struct PacedRows {
  NextRows<Rows> next;
  int64_t every;
  int64_t wait = 0, done = 0;

  FI_HD void step() {
    if (wait-- > 0) return;
    next.prefetch(done++);
    wait = every - 1;
  }
};

// The rows that a pass reads, and those of the pass after it: what is prefetched while row j is read is the
// row `distance` rows later, wherever it lies.
template <class Rows>
struct RowsAhead {
  Rows rows;
  int64_t n;
  Rows next;
  int64_t next_n;             // 0: nothing follows
  int64_t distance;           // at most n
  int64_t bytes, next_bytes;  // of a head's part of a row

  // What to prefetch while head h of rows [j, j + count) is read, as many rows. Some may lie behind the last
  // one: a prefetch reads nothing.
  FI_HD NextRows<Rows> of(int64_t h, int64_t j, int64_t count) const {
    j += distance;
    if (j + count <= n) return {rows.from(j).shifted(h * bytes), bytes};
    return {next.from(j < n ? 0 : j - n).shifted(h * next_bytes), next_n ? next_bytes : 0};
  }
};

}  // namespace fi::FI_ISA
