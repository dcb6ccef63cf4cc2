// How Hopper's kernel hands out the tiles of a batch (fi/cuda/sm90/batch_work.h), against loops over rows and keys.
#include "fi/cuda/sm90/batch_work.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

namespace {

using namespace fi::cuda;
using fi::BatchAttentionParams;

int failures = 0;

void fail(const char* what, int a = 0, int b = 0, int c = 0) {
  if (++failures < 20) std::printf("%s (%d, %d, %d)\n", what, a, b, c);
}

void check_divisor() {
  for (unsigned divisor : {1u, 2u, 3u, 5u, 7u, 8u, 24u, 100u, 255u, 4096u, 1000003u, (1u << 29) - 1, 1u << 29}) {
    const Divisor by(divisor);
    for (unsigned x : {0u, 1u, divisor - 1, divisor, divisor + 1, 7 * (divisor / 7), (1u << 31) - 1, 1u << 30})
      if (x < 1u << 31 && by.divide(x) != x / divisor) fail("a quotient", int(x), int(divisor), int(by.divide(x)));
    for (int i = 0; i < 2000; ++i) {
      const unsigned x = unsigned(std::rand()) & 0x7fffffffu;
      if (by.divide(x) != x / divisor) fail("a quotient", int(x), int(divisor), int(by.divide(x)));
    }
  }
}

struct Batch {
  std::vector<int> qo_lens, kv_lens;
  int page_size;  // 0: ragged
  int heads, kv_heads;
  bool causal;
  int window_left;
};

// The batch's tensors, and a plan of all its requests in tiles.
struct Call {
  std::vector<int32_t> qo_indptr{0}, kv_indptr{0}, last_page_len, kv_indices, plan;
  BatchAttentionParams p{};

  explicit Call(const Batch& batch, int num_pages = 1000) {
    const int page = batch.page_size ? batch.page_size : 1;
    for (size_t b = 0; b < batch.qo_lens.size(); ++b) {
      const int pages = (batch.kv_lens[b] + page - 1) / page;
      qo_indptr.push_back(qo_indptr.back() + batch.qo_lens[b]);
      kv_indptr.push_back(kv_indptr.back() + pages);
      last_page_len.push_back(pages ? batch.kv_lens[b] - (pages - 1) * page : 0);
    }
    for (int i = 0; i < kv_indptr.back(); ++i) kv_indices.push_back(std::rand() % (num_pages + 40) - 20);
    p.call.batch = int64_t(batch.qo_lens.size());
    p.call.num_qo_heads = batch.heads, p.call.num_kv_heads = batch.kv_heads;
    p.call.qo_len = qo_indptr.back();
    p.call.kv_len = int64_t{kv_indptr.back()} * page;
    p.call.head_dim_qk = 192, p.call.head_dim_vo = 128;
    p.call.causal = batch.causal, p.call.window_left = batch.window_left;
    p.qo_indptr.data = qo_indptr.data();
    p.table.kv_indptr.data = kv_indptr.data();
    p.table.nnz_pages = kv_indptr.back(), p.table.batch = p.call.batch;
    p.table.num_pages = 0, p.table.page_size = 1;
    if (batch.page_size) {
      p.table.kv_indices.data = kv_indices.data();
      p.table.num_pages = num_pages, p.table.page_size = page;
      p.kv_last_page_len.data = last_page_len.data();
    }
  }

  batch::PlanView planned(const std::vector<fi::PlanTile>& tiles) {
    const fi::PlanSizes sizes =
        fi::plan_sizes(p.call.batch, p.call.qo_len, p.call.num_qo_heads / p.call.num_kv_heads);
    plan.assign(sizeof(fi::PlanHeader) / 4 + 5 * sizes.max_segments + 2 * sizes.max_tiles, 0);
    const batch::PlanView view = batch::PlanView::of(p, plan.data());
    reinterpret_cast<fi::PlanHeader*>(plan.data())->num_tiles = int32_t(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) const_cast<fi::PlanTile*>(view.tiles)[i] = tiles[i];
    return view;
  }
};

void check_tile(const Call& call, const sm90::BatchShape& shape, const sm90::BatchTile& t, int block_n) {
  const fi::Request r = fi::request_of(call.p, t.work.b);
  const int kv_len = int(r.kv_len), qo_len = int(r.qo_len), offset = kv_len - qo_len;
  if (t.qo_len != qo_len || t.kv_len != kv_len || t.q_begin != r.q_begin || t.kv_begin != r.kv_begin)
    fail("lengths of a request", t.work.b);
  const int end = t.q_end;
  if (end > qo_len || t.work.q_start >= end) fail("queries of a tile", t.work.b, t.work.q_start, end);
  const auto sees = [&](int i, int j) {
    return (!shape.causal || j <= i + offset) && (shape.window_left < 0 || j >= i + offset - shape.window_left);
  };
  int first = -1, last = -1;
  for (int tile = 0; tile * block_n < kv_len; ++tile) {
    bool any = false, all = (tile + 1) * block_n <= kv_len;
    for (int j = tile * block_n; j < (tile + 1) * block_n && j < kv_len; ++j)
      for (int i = t.work.q_start; i < end; ++i) {
        const bool seen = sees(i, j);
        any = any || seen, all = all && seen;
        const bool by_tile = j <= i + t.last_key && j >= i + t.first_key;
        if (seen != by_tile) fail("what a row sees", t.work.b, i, j);
        if (seen && (j < t.values.begin || j >= t.values.end)) fail("values that a row needs", t.work.b, i, j);
      }
    if (any) last = tile, first = first < 0 ? tile : first;
    if (any && all != (tile >= t.work.whole.begin && tile < t.work.whole.end)) fail("a whole tile", t.work.b, tile);
  }
  const fi::cuda::sm90::Range tiles = t.work.tiles;
  if (first < 0 ? tiles.size() != 0 : tiles.begin != first || tiles.end != last + 1)
    fail("the KV tiles of a tile", t.work.b, tiles.begin, tiles.end);
  for (int j = 0; j < kv_len + 3; ++j) {
    const int page = sm90::checked_page(shape, sm90::key_page(shape, t, j, 1));
    if (j >= kv_len || j < t.values.begin) {
      if (page != -1) fail("the page of no key", t.work.b, j, page);
      continue;
    }
    const fi::PageEntry entry = fi::key_entry(call.p, r, j);
    if (page != entry.page || (page >= 0 && sm90::key_entry(shape, t, j) != entry.entry))
      fail("the place of a key", t.work.b, j, page);
  }
}

template <int block_m, int block_n>
void check_batch(const Batch& batch, int blocks) {
  Call call(batch);
  std::vector<fi::PlanTile> tiles;
  size_t expected = 0;
  for (int b = 0; b < int(batch.qo_lens.size()); ++b) {
    for (int q = 0; q < batch.qo_lens[b]; q += fi::kTileQueries) tiles.push_back({b, q});
    expected += size_t(batch.qo_lens[b]) * batch.heads;
  }
  for (size_t i = tiles.size(); i > 1; --i) std::swap(tiles[i - 1], tiles[std::rand() % i]);
  sm90::BatchShape shape = sm90::batch_shape(call.p, call.planned(tiles), block_m, 132);
  if (std::rand() % 2) shape.section_heads = batch.heads / batch.kv_heads * (1 + std::rand() % batch.kv_heads);
  const int group = batch.heads / batch.kv_heads;
  std::set<std::pair<int, std::pair<int, int>>> seen;
  for (int block = 0; block < blocks; ++block) {
    sm90::BatchTile tile;
    for (auto queue = sm90::first_of_queue<block_m>(shape);; queue = tile.queue) {
      sm90::next_batch_tile<block_m, block_n>(shape, blocks, block, queue, tile);
      if (!tile.any()) break;
      if (tile.kv_head != tile.work.head / group) fail("a KV head", tile.work.head);
      if (tile.packed && tile.work.head % group) fail("the first head of a group", tile.work.head);
      const int heads = tile.packed ? group : 1, rows = (tile.q_end - tile.work.q_start) * heads;
      if (rows < 1 || rows > block_m) fail("rows of a tile", tile.work.b, rows);
      for (int row = 0; row < rows; ++row)
        if (!seen.insert({tile.work.b, {tile.work.q_start + row / heads, tile.work.head + row % heads}}).second)
          fail("a row twice", tile.work.b, tile.work.q_start, tile.work.head);
      check_tile(call, shape, tile, block_n);
    }
  }
  if (seen.size() != expected) fail("rows missing", int(seen.size()), int(expected));
}

// Whatever the tensors hold, nothing outside of them is named.
template <int kBlockM>
void check_hostile(int page_size) {
  const int far[] = {-1, -2147483647, 2147483647, 100, 5, 0, 3};
  const auto any = [&] { return far[std::rand() % 7]; };
  for (int seed = 0; seed < 2000; ++seed) {
    Call call({{100, 3, 40}, {90, 10, 50}, page_size, 4, 2, seed % 2 == 0, seed % 3 - 1}, 8);
    for (auto* values : {&call.qo_indptr, &call.kv_indptr, &call.last_page_len, &call.kv_indices})
      for (int32_t& x : *values)
        if (std::rand() % 3 == 0) x = any();
    const batch::PlanView plan = call.planned({{any(), any()}, {0, 0}, {1, any()}, {any(), 0}});
    reinterpret_cast<fi::PlanHeader*>(call.plan.data())->num_tiles = any();
    sm90::BatchShape shape = sm90::batch_shape(call.p, plan, kBlockM, 132);
    if (seed % 2) shape.section_heads = 2;
    for (int block = 0; block < 3; ++block) {
      sm90::BatchTile t;
      for (auto queue = sm90::first_of_queue<kBlockM>(shape);; queue = t.queue) {
        sm90::next_batch_tile<kBlockM, 80>(shape, 3, block, queue, t);
        if (!t.any()) break;
        if (t.q_begin < 0 || t.q_begin + t.qo_len > call.p.call.qo_len) fail("queries outside", t.q_begin, t.qo_len);
        if (t.work.q_start < 0 || t.work.q_start >= t.qo_len) fail("a tile outside", t.work.q_start, t.qo_len);
        if (t.work.tiles.begin < 0 || t.work.tiles.end * 80 >= t.kv_len + 80) fail("KV tiles outside", t.kv_len);
        for (int j = 0; j < t.kv_len; ++j) {
          const int page = sm90::checked_page(shape, sm90::key_page(shape, t, j, 1));
          const int entry = sm90::key_entry(shape, t, j);
          const int rows = page_size ? page_size : int(call.p.table.nnz_pages);
          if (page >= (page_size ? 8 : 1) || entry < 0 || entry >= rows) fail("a key outside", page, entry);
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_divisor();
  for (int page_size : {0, 1, 3, 16, 100, 128})
    for (bool causal : {false, true})
      for (int window_left : {-1, 0, 70, 1 << 30}) {
        const Batch batch{{1, 150, 0, 128, 300, 40, 900}, {300, 150, 20, 0, 120, 500, 950}, page_size, 6, 2, causal,
                          window_left};
        check_batch<128, 128>(batch, 5);
        check_batch<128, 80>(batch, 7);
        check_batch<192, 80>(batch, 5);
        check_batch<192, 112>(batch, 50);
      }
  check_batch<128, 128>({{17, 33, 127, 1, 70}, {60, 33, 500, 9, 30}, 16, 16, 2, true, -1}, 5);
  check_batch<128, 80>({{17, 33, 127, 1, 70}, {60, 33, 500, 9, 30}, 1, 40, 1, true, 20}, 5);
  check_batch<128, 128>({{}, {}, 16, 4, 2, true, -1}, 3);
  check_batch<192, 80>({{}, {}, 16, 4, 2, true, -1}, 3);
  for (int page_size : {0, 1, 16}) {
    check_hostile<128>(page_size);
    check_hostile<192>(page_size);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
