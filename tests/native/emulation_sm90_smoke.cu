// What the emulator promises of Hopper's instructions, asked of it: products of all operand kinds from boxes
// that the copy engine brings, copies to a cluster; and that each of the mistakes below is seen.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "fi/cuda/launch.h"
#include "fi/cuda/sm90/fp8_wgmma.h"
#include "fi/cuda/sm90/mla_ptx.h"
#include "fi/cuda/sm90/tensor_map.h"
#include "fi/cuda/sm90/warpgroup.h"

namespace {

using namespace fi::cuda;
using namespace fi::cuda::sm90;
using fi::bf16;
using fi::Fp8;

enum class Mistake {
  none,
  // The result is wrong, NaN as a rule.
  no_wait_for_boxes,
  read_before_the_wait,
  box_over_an_operand_that_is_not_free,
  // The emulator says so.
  no_fence,
  operand_written,
  registers_written,
  accumulator_written,
  too_few_arrivals,
  no_barrier,
  copy_outlives_the_block
};

constexpr int kRows = 64, kColumns = 80, kK = 128, kPanelBytes = 128 * kColumns;

struct Smem {
  alignas(1024) unsigned char a[2][64 * 128], b[2][kPanelBytes], b_mn[2][128 * kK];
  Barrier full, empty, none;
};

// What a's and b's 64 columns of a panel are multiplied with: c = a b^T, then c += a b_mn of the first
// kColumns columns, with a's first half in registers.
__global__ void gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap b_mn_map, Mistake mistake, float* out) {
  auto& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  if (threadIdx.x == 0) {
    barrier_init(smem.full, 1);
    barrier_init(smem.empty, mistake == Mistake::too_few_arrivals ? 5 : 4);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroupThreads) {  // the producer
    if (threadIdx.x > kWarpgroupThreads) return;
    if (mistake == Mistake::no_barrier) barrier_arrive(smem.none);
    barrier_arrive_expect(smem.full, sizeof(smem.a) + sizeof(smem.b) + sizeof(smem.b_mn));
    for (int panel = 0; panel < 2; ++panel) {
      load_box(smem.a[panel], a_map, 64 * panel, 0, 0, 0, smem.full);
      load_box(smem.b[panel], b_map, 64 * panel, 0, 0, 0, smem.full);
      load_box(smem.b_mn[panel], b_mn_map, 64 * panel, 0, 0, 0, smem.full);
    }
    const bool early = mistake == Mistake::box_over_an_operand_that_is_not_free;
    if (mistake == Mistake::copy_outlives_the_block || early) {
      barrier_wait(early ? smem.full : smem.empty, 0);
      load_box(smem.b[1], b_map, 0, 0, 0, 0, smem.full);
      if (early) barrier_arrive_expect(smem.full, kPanelBytes);
    } else {
      barrier_wait(smem.empty, 0);
    }
    if (early) barrier_wait(smem.full, 1);
    return;
  }
  if (mistake != Mistake::no_wait_for_boxes) barrier_wait(smem.full, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = 16 * warp + lane % 16;
  uint32_t a_registers[4][4];
  for (int step = 0; step < 4; ++step)
    ldmatrix_x4(a_registers[step], smem.a[0] + row * 128 + ((2 * step + lane / 16) ^ row % 8) * 16);
  if (mistake == Mistake::box_over_an_operand_that_is_not_free)
    for (int i = 0; i < 100; ++i) __syncwarp();  // the producer is at it by now
  float d[kColumns / 2];
  if (mistake != Mistake::no_fence) wgmma_fence();
  const uint64_t a = k_major(smem_address(smem.a[0])), b = k_major(smem_address(smem.b[0]));
  for (int panel = 0; panel < 2; ++panel)
    for (int step = 0; step < 4; ++step)
      Wgmma<kColumns>::k_by_k<bf16>(d, at(a, panel * sizeof(smem.a[0]) + step * 32),
                                    at_low(b, panel * kPanelBytes + step * 32), panel + step > 0);
  wgmma_commit();
  if (mistake == Mistake::operand_written) {
    __syncwarp();
    if (threadIdx.x == 77) smem.b[1][3000] ^= 1;
  }
  if (mistake == Mistake::accumulator_written) d[5] = 0;
  if (mistake == Mistake::read_before_the_wait) out[threadIdx.x] = d[3];
  const uint64_t b_mn = mn_major(smem_address(smem.b_mn[0]), sizeof(smem.b_mn[0]));
  for (int step = 0; step < 8; ++step) {
    if (step < 4) {
      Wgmma<kColumns>::registers_by_mn<bf16>(d, a_registers[step], at(b_mn, step * 2048), true);
    } else {
      Wgmma<kColumns>::k_by_mn<bf16>(d, at(a, sizeof(smem.a[0]) + step % 4 * 32), at(b_mn, step * 2048),
                                     true);
    }
  }
  wgmma_commit();
  if (mistake == Mistake::registers_written) a_registers[2][1] = 0;
  wgmma_wait<0>();
  if (mistake == Mistake::no_wait_for_boxes) barrier_wait(smem.full, 0);
  __syncwarp();
  if (lane == 0) barrier_arrive(smem.empty);
  if (mistake == Mistake::read_before_the_wait) return;
  for (int i = 0; i < kColumns / 2; ++i)
    out[(16 * warp + lane / 4 + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct Fp8Smem {
  alignas(1024) unsigned char a[64 * 128], b[64 * 128];
  Barrier full;
};

// c = a b^T of 64 x 64 x 64 e4m3, rows of 64 bytes copied by threads: from shared memory, or a from
// registers.
__global__ void fp8_gemm(const uint8_t* a, const uint8_t* b, bool from_registers, bool fenced, float* out) {
  auto& smem = *reinterpret_cast<Fp8Smem*>(dynamic_smem());
  if (threadIdx.x == 0) barrier_init(smem.full, kWarpgroupThreads);
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 4; i += kWarpgroupThreads) {
    const int to = i / 4 * 128 + (i % 4 ^ i / 4 % 8) * 16;
    cp_async_16(smem.a + to, a + 16 * i);
    cp_async_16(smem.b + to, b + 16 * i);
  }
  barrier_arrive_after_copies(smem.full);
  barrier_wait(smem.full, 0);
  if (fenced) fence_for_products();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[32];
  uint32_t registers[2][4];
  for (int step = 0; step < 2; ++step)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&registers[step][i],
                  a + (16 * warp + lane / 4 + i % 2 * 8) * 64 + 32 * step + i / 2 * 16 + lane % 4 * 4, 4);
  wgmma_fence();
  const uint64_t operand_a = k_major(smem_address(smem.a)), operand_b = k_major(smem_address(smem.b));
  for (int step = 0; step < 2; ++step) {
    if (from_registers) {
      Fp8Wgmma<64>::registers_by_k<Fp8::e4m3>(d, registers[step], at(operand_b, 32 * step), step > 0);
    } else {
      Fp8Wgmma<64>::k_by_k<Fp8::e4m3>(d, at(operand_a, 32 * step), at(operand_b, 32 * step), step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i)
    out[(16 * warp + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct ClusterSmem {
  alignas(1024) unsigned char box[2][64 * 128];
  Barrier full, seen;
};

// Each block of two brings one box for both, and writes both of what it got.
__global__ void share(const __grid_constant__ CUtensorMap map, uint16_t* out) {
  auto& smem = *reinterpret_cast<ClusterSmem*>(dynamic_smem());
  if (threadIdx.x == 0) barrier_init(smem.full, 1), barrier_init(smem.seen, 2);
  cluster_arrive();
  cluster_wait();
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    load_box_for_both(smem.box[rank], map, 64 * rank - 8, 1, 0, 0, smem.full);
    barrier_arrive_expect(smem.full, sizeof(smem.box));
  }
  barrier_wait(smem.full, 0);
  for (int i = threadIdx.x; i < 2 * 64 * 64; i += 32) {
    const int panel = i / 4096, row = i / 64 % 64, column = i % 64;
    std::memcpy(&out[rank * 8192 + i],
                smem.box[panel] + row * 128 + ((column / 8 ^ row % 8) * 8 + column % 8) * 2, 2);
  }
  __syncwarp();
  if (threadIdx.x < 2) barrier_arrive_at(smem.seen, threadIdx.x);
  barrier_wait(smem.seen, 0);
}

const Gpu kGpu{nullptr, 4, 90, 227 * 1024};

CUtensorMap map_of(const std::vector<bf16>& x, int rows, int columns, int box_rows) {
  return make_tensor_map(fi::DType::bf16, HeadRows{x.data(), 1, 1, rows, columns, 0, 0, columns}, box_rows);
}

std::vector<bf16> values(int count, int seed) {
  std::vector<bf16> x(count);
  for (int i = 0; i < count; ++i) x[i] = fi::to_bf16(float((i + seed) * 37 % 19) - 9);
  return x;
}

// What the emulator says, "wrong" for a result that is, nothing for one that is right.
std::string run_gemm(Mistake mistake) {
  const auto a = values(kRows * kK, 0), b = values(kColumns * kK, 5), b_mn = values(kK * 128, 9);
  std::vector<float> out(kRows * kColumns);
  try {
    launch(kGpu, gemm, dim3(1), dim3(kWarpgroupThreads + 32), sizeof(Smem), map_of(a, kRows, kK, kRows),
           map_of(b, kColumns, kK, kColumns), map_of(b_mn, kK, 128, kK), mistake, out.data());
  } catch (const std::exception& e) {
    return e.what();
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      float want = 0;
      for (int k = 0; k < kK; ++k)
        want += fi::to_float(a[i * kK + k]) * (fi::to_float(b[j * kK + k]) + fi::to_float(b_mn[k * 128 + j]));
      if (out[i * kColumns + j] != want) return "wrong";
    }
  return "";
}

bool sees(Mistake mistake, const char* text) {
  const std::string got = run_gemm(mistake);
  const bool ok = got.empty() ? mistake == Mistake::none : got.find(text) != got.npos;
  if (!ok)
    std::printf("mistake %d: \"%s\" instead of \"%s\"\n", static_cast<int>(mistake), got.c_str(), text);
  return ok;
}

bool fp8_is_right(bool from_registers, bool fenced) {
  std::vector<uint8_t> a(64 * 64), b(64 * 64);
  for (int i = 0; i < 64 * 64; ++i)
    a[i] = fi::to_e4m3(i * 7 % 9 - 4.0f), b[i] = fi::to_e4m3(i * 5 % 7 - 3.0f);
  std::vector<float> out(64 * 64);
  try {
    launch(kGpu, fp8_gemm, dim3(1), dim3(kWarpgroupThreads), sizeof(Fp8Smem), a.data(), b.data(),
           from_registers, fenced, out.data());
  } catch (const std::exception& e) {
    if (fenced) std::printf("8 bits: %s\n", e.what());
    return !fenced && std::string(e.what()).find("no fence_for_products") != std::string::npos;
  }
  if (!fenced) return std::printf("a missing fence_for_products\n"), false;
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) {
      float want = 0;
      for (int k = 0; k < 64; ++k) want += fi::from_e4m3(a[i * 64 + k]) * fi::from_e4m3(b[j * 64 + k]);
      if (out[i * 64 + j] != want) return std::printf("8 bits (%d, %d)\n", i, j), false;
    }
  return true;
}

bool cluster_shares() {
  constexpr int kTensorRows = 40, kTensorColumns = 96;  // boxes reach over all ends
  const auto x = values(kTensorRows * kTensorColumns, 3);
  std::vector<uint16_t> out(2 * 2 * 64 * 64);
  launch_clusters(kGpu, share, dim3(2), 2, dim3(32), sizeof(ClusterSmem), false,
                  map_of(x, kTensorRows, kTensorColumns, 64), out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    const int row = int(i / 64 % 64) + 1, column = int(i / 4096 % 2 * 64 + i % 64) - 8;
    const bool inside = row < kTensorRows && column >= 0 && column < kTensorColumns;
    if (out[i] != (inside ? x[row * kTensorColumns + column].bits : 0))
      return std::printf("a shared box: %d\n", int(i)), false;
  }
  return true;
}

}  // namespace

int main() {
  using enum Mistake;
  bool ok = sees(none, "") && fp8_is_right(false, true) && fp8_is_right(true, true) && cluster_shares();
  ok = sees(no_wait_for_boxes, "wrong") && ok;
  ok = sees(read_before_the_wait, "wrong") && ok;
  ok = sees(box_over_an_operand_that_is_not_free, "") && ok;  // whatever comes of it
  ok = fp8_is_right(false, false) && ok;
  ok = sees(no_fence, "no wgmma_fence") && ok;
  ok = sees(operand_written, "wgmma: ") && ok;
  ok = sees(registers_written, "operand a was written") && ok;
  ok = sees(accumulator_written, "an accumulator was written") && ok;
  ok = sees(too_few_arrivals, "lacks 1 of 5 arrivals and 0 bytes") && ok;
  ok = sees(no_barrier, "mbarrier: there is none") && ok;
  ok = sees(copy_outlives_the_block, "a block ended") && ok;
  return ok ? 0 : 1;
}
