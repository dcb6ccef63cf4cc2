// The emulator's stand-in for the driver's header: tensor maps, as plain data, and what the driver refuses.
// See README.md.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulation/types.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// Of four dimensions, innermost first; elements of 2 bytes, boxes swizzled by 128 bytes.
struct alignas(64) CUtensorMap {
  const unsigned char* base;
  uint64_t extents[4], strides[4];  // strides in bytes
  uint32_t box[4];
};

// Refuses what the driver's documentation says that the driver refuses, and the variants that nothing here
// asks for.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* extents, const cuuint64_t* strides,
                                       const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr cuuint32_t kElementBytes = 2, kMostRowBytes = 128;  // of a box, with that swizzle
  if (rank != 4 || base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(base), {}, {kElementBytes}, {}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (extents[i] == 0 || extents[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    map->extents[i] = extents[i];
    map->box[i] = box[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i] = strides[i - 1];
  }
  const cuuint32_t row_bytes = box[0] * kElementBytes;
  return row_bytes % 16 == 0 && row_bytes <= kMostRowBytes ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// The driver's functions are asked for at run time; there is one.
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                           cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
