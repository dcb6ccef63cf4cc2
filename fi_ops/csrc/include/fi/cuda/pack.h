// Up to 16 bytes of elements a memory instruction, as fp32 in registers.
//
// N is 16 bytes' worth of the storage type, with pointers aligned to 16 bytes, or 1 with no demand. A pack
// of another type than the one that N was chosen for (fp32 weights of a bf16 row) takes two instructions.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/scalar.h"

namespace fi::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T x[N];
};

template <class T>
inline constexpr int kPackSize = 16 / sizeof(T);

template <int N, class T>
FI_DEVICE_INLINE void load_pack(float (&x)[N], const T* p) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    const auto words = *reinterpret_cast<const Pack<uint32_t, N / 2>*>(p);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 two = unpack2<T>(words.x[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  } else {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(pack.x[i]);
  }
}

// N elements from element i of an array of float, bf16 or f16.
template <int N>
FI_DEVICE_INLINE void load_pack_as(float (&x)[N], const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) {
    load_pack(x, static_cast<const float*>(p) + i);
  } else if (dtype == DType::bf16) {
    load_pack(x, static_cast<const bf16*>(p) + i);
  } else {
    load_pack(x, static_cast<const f16*>(p) + i);
  }
}

template <int N, class T>
FI_DEVICE_INLINE void store_pack(T* p, const float (&x)[N]) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    Pack<uint32_t, N / 2> words;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words.x[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<Pack<uint32_t, N / 2>*>(p) = words;
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.x[i] = from_float<T>(x[i]);
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  }
}

// Bit for bit.
template <int N, class T>
FI_DEVICE_INLINE void copy_pack(T* y, const T* x) {
  *reinterpret_cast<Pack<T, N>*>(y) = *reinterpret_cast<const Pack<T, N>*>(x);
}

}  // namespace fi::cuda
