// The scan of a mask for the Hopper kernel (fi/cuda/sm90/mask_bits.h) against a loop over rows and keys.
#include "fi/cuda/sm90/mask_bits.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using namespace fi::cuda;
using fi::AttentionParams;

int failures = 0;

std::vector<std::unique_ptr<unsigned char[]>> scratch;

void* allocate(void*, int64_t bytes) {
  scratch.push_back(std::make_unique<unsigned char[]>(bytes + 64));
  for (int64_t i = 0; i < bytes + 64; ++i) scratch.back()[i] = 0xee;
  const auto address = reinterpret_cast<uintptr_t>(scratch.back().get());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// A mask [batch, heads, qo_len, kv_len] of which `shape` says which dimensions it has; key stride `stride_k`.
struct Call {
  const char* name;
  int batch, heads, qo_len, kv_len;
  bool has_b, has_h, has_q;
  int stride_k, padding;  // of a row, in keys
  double density;
  bool causal;
  int window_left;
  bool positions;
};

void check(const Call& c, int block_m, int block_n) {
  const int64_t row = int64_t(c.kv_len) * c.stride_k + c.padding;
  const int64_t rows = int64_t(c.has_b ? c.batch : 1) * (c.has_h ? c.heads : 1) * (c.has_q ? c.qo_len : 1);
  // Exactly as long as the mask is, so that a sanitizer sees what reads past its end.
  std::vector<uint8_t> mask((rows - 1) * row + int64_t(c.kv_len - 1) * c.stride_k + 1);
  for (auto& x : mask) x = std::rand() < c.density * RAND_MAX ? 1 + std::rand() % 2 * 127 : 0;
  std::vector<int64_t> positions(c.batch * c.qo_len);
  for (auto& x : positions) x = std::rand() % (c.kv_len + 20) - 10;

  AttentionParams p{};
  p.batch = c.batch, p.num_qo_heads = c.heads, p.num_kv_heads = 1, p.qo_len = c.qo_len, p.kv_len = c.kv_len;
  p.mask = mask.data();
  p.mask_stride_k = c.stride_k;
  p.mask_stride_q = c.has_q ? row : 0;
  p.mask_stride_h = c.has_h ? row * (c.has_q ? c.qo_len : 1) : 0;
  p.mask_stride_b = c.has_b ? row * (c.has_q ? c.qo_len : 1) * (c.has_h ? c.heads : 1) : 0;
  p.causal = c.causal;
  p.window_left = c.window_left;
  p.q_offset = c.kv_len - c.qo_len;
  if (c.positions) p.query_positions = {positions.data(), true, c.qo_len, 1};
  p.scratch = {allocate, nullptr};
  const Gpu gpu{nullptr, 4, 90, 227 * 1024};
  const sm90::MaskBits got = sm90::scan_mask(p, gpu, block_m, block_n);

  const auto sees = [&](int b, int h, int64_t i, int j) {
    if (i >= p.qo_len || j >= p.kv_len) return false;
    const int64_t at = fi::query_position(p, b, i);
    return (!c.causal || j <= at) && (c.window_left < 0 || j >= at - c.window_left) &&
           mask[b * p.mask_stride_b + h * p.mask_stride_h + i * p.mask_stride_q + j * p.mask_stride_k] != 0;
  };
  const auto fail = [&](const char* what, int b, int h, int q_tile, int tile) {
    if (++failures < 20)
      std::printf("%s, tiles of %d x %d: %s of b %d, h %d, q tile %d, tile %d\n", c.name, block_m, block_n, what, b,
                  h, q_tile, tile);
  };
  for (int b = 0; b < c.batch; ++b)
    for (int h = 0; h < c.heads; ++h)
      for (int q_tile = 0; q_tile * block_m < c.qo_len; ++q_tile)
        for (int tile = 0; tile * block_n < c.kv_len; ++tile) {
          const int64_t at = b * got.stride_b + h * got.stride_h + q_tile * got.stride_q + tile;
          const uint32_t* bits = got.bits + at * 4 * (block_m + 1);
          bool any = false, all = true;
          std::vector<bool> column(block_n);
          for (int r = 0; r < block_m; ++r)
            for (int k = 0; k < block_n; ++k) {
              const bool seen = sees(b, h, int64_t(q_tile) * block_m + r, tile * block_n + k);
              any = any || seen;
              all = all && (seen || q_tile * block_m + r >= c.qo_len);
              column[k] = column[k] || seen;
            }
          bool unseen = false;
          for (int k = 0; k < block_n; ++k) unseen = unseen || !column[k];
          const int flags = any ? sm90::kSeen | (all ? 0 : sm90::kCut) | (unseen ? sm90::kHasUnseen : 0) : 0;
          if (got.classes[at] != flags) fail("the class", b, h, q_tile, tile);
          if (!any) continue;
          for (int k = 0; k < block_n; ++k)
            if ((bits[4 * block_m + k / 32] >> k % 32 & 1) != column[k]) fail("a column", b, h, q_tile, tile);
          for (int r = 0; r < block_m && q_tile * block_m + r < c.qo_len; ++r)
            for (int k = 0; k < block_n; ++k) {
              const uint32_t word = bits[4 * r + k % 8 / 2];
              if ((word >> (k / 8 * 2 + k % 2) & 1) != sees(b, h, int64_t(q_tile) * block_m + r, tile * block_n + k))
                fail("a bit", b, h, q_tile, tile);
            }
        }
  scratch.clear();
}

}  // namespace

int main() {
  const Call calls[] = {
      {"aligned", 2, 1, 200, 256, true, false, true, 1, 0, 0.7, false, -1, false},
      {"causal", 1, 1, 150, 320, false, false, true, 1, 0, 1.0, true, -1, false},
      {"odd rows", 1, 2, 130, 301, false, true, true, 1, 0, 0.9, false, -1, false},
      {"odd rows, dense", 2, 1, 70, 257, true, false, true, 1, 0, 1.0, true, 90, false},
      {"padded rows", 1, 1, 129, 203, false, false, true, 1, 6, 0.99, true, -1, true},
      {"strided keys", 1, 2, 65, 190, false, true, true, 3, 1, 0.6, true, 40, true},
      {"padding alone", 2, 3, 300, 210, true, false, false, 1, 0, 0.5, false, -1, false},
      {"padding, positions", 2, 3, 140, 210, false, false, false, 1, 0, 0.95, true, 50, true},
      {"empty", 1, 1, 64, 128, false, false, true, 1, 0, 0.0, false, -1, false},
  };
  for (const Call& call : calls)
    for (const auto& [block_m, block_n] : {std::pair{128, 128}, {192, 80}, {192, 112}, {128, 80}})
      check(call, block_m, block_n);
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
