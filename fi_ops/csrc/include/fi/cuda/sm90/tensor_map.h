// Tensor maps, on the host: what the copy engine needs to know of a tensor with free strides.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fi/cuda/launch.h"
#include "fi/scalar.h"

namespace fi::cuda::sm90 {

// 128 bytes of a 16-bit type: the widest box that the 128-byte swizzle takes.
inline constexpr int kBoxColumns = 64;
// How many boxes are as wide as a row: the last one may reach over its end, where zeros arrive.
constexpr int panels_of(int columns) { return (columns + kBoxColumns - 1) / kBoxColumns; }

// [batch, heads, rows, columns] of a 16-bit type, columns contiguous.
struct HeadRows {
  const void* base;
  int64_t batch, heads, rows, columns;
  int64_t stride_b, stride_h, stride_n;  // in elements
};

// Whether the copy engine can read it: 16-byte steps, and no stride of 0 unless it is never taken.
inline bool tensor_map_takes(const HeadRows& x) {
  const auto fits = [](int64_t extent, int64_t stride) {
    return extent == 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 38));
  };
  return reinterpret_cast<uintptr_t>(x.base) % 16 == 0 && x.columns % 8 == 0 && fits(x.batch, x.stride_b) &&
         fits(x.heads, x.stride_h) && fits(x.rows, x.stride_n);
}

// The driver's function, asked for at run time: nothing links against the driver.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &result),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
#endif
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("fi_ops: this CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

struct MapDim {
  int64_t extent, stride;
  int box;
};

// Boxes of kBoxColumns columns and the rest as said, swizzled by 128 bytes. Coordinates: column, then those
// of `dims`.
inline CUtensorMap make_tensor_map(DType dtype, const void* base, int64_t columns, const MapDim (&dims)[3]) {
  cuuint64_t extents[4] = {static_cast<cuuint64_t>(columns)}, strides[3];
  cuuint32_t box[4] = {kBoxColumns};
  for (int i = 0; i < 3; ++i) {
    extents[i + 1] = static_cast<cuuint64_t>(dims[i].extent);
    // Never taken where the extent is 1.
    strides[i] = dims[i].extent == 1 ? 16 : static_cast<cuuint64_t>(2 * dims[i].stride);
    box[i + 1] = static_cast<cuuint32_t>(dims[i].box);
  }
  const cuuint32_t step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(base), extents, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("fi_ops: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

// Boxes of `box_rows` rows of one head. Coordinates: column, row, head, batch.
inline CUtensorMap make_tensor_map(DType dtype, const HeadRows& x, int box_rows) {
  return make_tensor_map(
      dtype, x.base, x.columns,
      {{x.rows, x.stride_n, box_rows}, {x.heads, x.stride_h, 1}, {x.batch, x.stride_b, 1}});
}
// Boxes of the same row of `box_heads` heads, then of the next one, `box_rows` of them. Coordinates: column,
// head, row, batch.
inline CUtensorMap make_packed_tensor_map(DType dtype, const HeadRows& x, int box_heads, int box_rows) {
  return make_tensor_map(
      dtype, x.base, x.columns,
      {{x.heads, x.stride_h, box_heads}, {x.rows, x.stride_n, box_rows}, {x.batch, x.stride_b, 1}});
}

}  // namespace fi::cuda::sm90
