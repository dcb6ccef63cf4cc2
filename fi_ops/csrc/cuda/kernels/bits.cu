// Packing of booleans into bits: a thread makes one output byte at a time out of eight elements.
#include "fi/bits.h"

#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

// Eight elements, the first in the lowest byte.
__device__ uint8_t pack_8(uint64_t x, bool little) {
  // 1 in each byte that is not 0: the carry out of the low seven bits, or the eighth bit itself.
  const uint64_t low = 0x7f7f7f7f7f7f7f7full;
  const uint64_t ones = (((x & low) + low) | x) >> 7 & 0x0101010101010101ull;
  // The product gathers bit 8i at bit 56 + i (or 63 - i); no two partial products meet.
  return static_cast<uint8_t>(ones * (little ? 0x0102040810204080ull : 0x8040201008040201ull) >> 56);
}

// The first `count` (at most 8) elements at x, zeros after them.
__device__ uint64_t load_8(const uint8_t* x, int64_t count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(x) % 8 == 0) return *reinterpret_cast<const uint64_t*>(x);
  uint64_t eight = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < count) eight |= uint64_t{x[k]} << (8 * k);
  return eight;
}

// The last segment that starts at `byte` or before it; the first, if none does. In range whatever is in
// `starts`, which is not checked by default.
__device__ int64_t segment_of(const Indices& starts, int64_t num_segments, int64_t byte) {
  int64_t low = 0, high = num_segments;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (starts.at(middle) <= byte) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int kBytesPerThread = 4;

__global__ void __launch_bounds__(kMaxThreads) packbits_kernel(const __grid_constant__ PackBitsParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t block_bytes = int64_t{blockDim.x} * kBytesPerThread;
  for (int64_t base = blockIdx.x * block_bytes; base < p.num_bytes; base += gridDim.x * block_bytes) {
    uint64_t eight[kBytesPerThread];
#pragma unroll
    for (int k = 0; k < kBytesPerThread; ++k) {
      const int64_t byte = base + int64_t{k} * blockDim.x + threadIdx.x;
      eight[k] = 0;
      if (byte >= p.num_bytes) continue;
      int64_t first = 8 * byte, end = p.num_elements;
      if (p.input_indptr) {
        if (p.num_segments == 0) continue;
        const int64_t s = segment_of(p.output_indptr, p.num_segments, byte);
        first = p.input_indptr.at(s) + 8 * (byte - p.output_indptr.at(s));
        end = smaller(p.input_indptr.at(s + 1), p.num_elements);
      }
      if (first >= 0 && first < end) eight[k] = load_8(p.input + first, smaller(end - first, 8));
    }
#pragma unroll
    for (int k = 0; k < kBytesPerThread; ++k) {
      const int64_t byte = base + int64_t{k} * blockDim.x + threadIdx.x;
      if (byte < p.num_bytes) p.output[byte] = pack_8(eight[k], p.little);
    }
  }
}

}  // namespace

void packbits(const PackBitsParams& p, const Gpu& gpu) {
  if (p.num_bytes == 0) return;
  const int64_t blocks = ceil_div(p.num_bytes, kMaxThreads * kBytesPerThread);
  const int64_t blocks_wanted = int64_t{gpu.num_sms} * 64;
  launch(gpu, packbits_kernel, dim3(static_cast<unsigned>(smaller(blocks, blocks_wanted))), dim3(kMaxThreads),
         0, /*overlap=*/true, p);
}

}  // namespace fi::cuda
