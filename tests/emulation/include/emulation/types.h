// CUDA's vector types, dim3 and the few runtime names that our host code uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define FI_VECTOR2(T, name)            \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define FI_VECTOR4(T, name, align) \
  struct alignas(align) name {     \
    T x, y, z, w;                  \
  };                               \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
FI_VECTOR2(float, float2)
FI_VECTOR2(double, double2)
FI_VECTOR2(int, int2)
FI_VECTOR2(unsigned, uint2)
FI_VECTOR2(short, short2)
FI_VECTOR2(unsigned short, ushort2)
FI_VECTOR2(unsigned char, uchar2)
FI_VECTOR2(long long, longlong2)
FI_VECTOR2(unsigned long long, ulonglong2)
FI_VECTOR4(float, float4, 16)
FI_VECTOR4(int, int4, 16)
FI_VECTOR4(unsigned, uint4, 16)
FI_VECTOR4(unsigned short, ushort4, 8)
FI_VECTOR4(unsigned char, uchar4, 4)
#undef FI_VECTOR2
#undef FI_VECTOR4

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
  std::memset(p, value, n);
  return cudaSuccess;
}
