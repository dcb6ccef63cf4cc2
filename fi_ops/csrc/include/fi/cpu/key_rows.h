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
  FI_HD StridedRows columns(int64_t d) const { return shifted(d * int64_t(sizeof(T))); }
};

template <class T>
struct PointerRows {
  const char* const* rows = nullptr;
  int64_t offset = 0;  // bytes

  FI_HD const T* operator[](int64_t j) const { return reinterpret_cast<const T*>(rows[j] + offset); }
  FI_HD PointerRows shifted(int64_t bytes) const { return {rows, offset + bytes}; }
  FI_HD PointerRows columns(int64_t d) const { return shifted(d * int64_t(sizeof(T))); }
};

// Rows that the next pass will read.
template <class Rows>
struct NextRows {
  Rows rows;
  int64_t bytes = 0;  // of a row; 0: nothing to prefetch

  FI_HD explicit operator bool() const { return bytes != 0; }
  FI_HD void prefetch(int64_t j) const {
    const auto* p = reinterpret_cast<const char*>(rows[j]);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
  }
};

}  // namespace fi::FI_ISA
