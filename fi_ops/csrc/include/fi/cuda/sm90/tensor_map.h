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
  return reinterpret_cast<uintptr_t>(x.base) % 16 == 0 && x.columns % kBoxColumns == 0 &&
         fits(x.batch, x.stride_b) && fits(x.heads, x.stride_h) && fits(x.rows, x.stride_n);
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

// Boxes of `box_rows` rows by kBoxColumns columns of one head, swizzled by 128 bytes. Coordinates: column,
// row, head, batch.
inline CUtensorMap make_tensor_map(DType dtype, const HeadRows& x, int box_rows) {
  const auto bytes = [](int64_t extent, int64_t stride) -> cuuint64_t {
    return extent == 1 ? 16 : static_cast<cuuint64_t>(2 * stride);  // never taken where the extent is 1
  };
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows),
                                 static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.batch)};
  const cuuint64_t strides[3] = {bytes(x.rows, x.stride_n), bytes(x.heads, x.stride_h),
                                 bytes(x.batch, x.stride_b)};
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(x.base), extents, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("fi_ops: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace fi::cuda::sm90
