// The plan of a batch's attention on the CPU.
#include "fi/batch_attention.h"

namespace fi::FI_ISA {

void batch_attention_plan(const BatchPlanParams& p, const Parallel&) {
  const auto [header, segments, tiles, sizes] = PlanParts::of(p.plan, p.batch, p.nnz_qo, p.group_size);
  __builtin_memset(segments, 0,
                   reinterpret_cast<char*>(tiles + sizes.max_tiles) - reinterpret_cast<char*>(segments));
  const int64_t unit_keys = unit_keys_of(p.fixed_split_size);

  int32_t num_segments = 0, num_units = 0, num_tiles = 0;
  int32_t first_of_class[kTileClasses + 1] = {};  // counts at first
  auto for_each_tile = [&](const auto& f) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const PlanRequest r = plan_request(p, b);
      if (r.qo_len * p.group_size <= kFewRows) continue;
      for (int64_t q = (r.qo_len - 1) / kTileQueries * kTileQueries; q >= 0; q -= kTileQueries)
        f(b, q, kTileClasses - 1 - tile_class_of(p, r, q));
    }
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    const PlanRequest r = plan_request(p, b);
    const int64_t rows = r.qo_len * p.group_size;
    if (rows > kFewRows) continue;
    for (int64_t row = 0; row < rows; row += kSegmentRows) {
      const UnitRange units = segment_units(p, r, row, unit_keys);
      segments[num_segments++] = {static_cast<int32_t>(b), static_cast<int32_t>(row), num_units, units.begin,
                                  units.count};
      num_units += units.count;
    }
  }
  for_each_tile([&](int64_t, int64_t, int32_t place) { ++first_of_class[place + 1], ++num_tiles; });
  for (int32_t c = 0; c < kTileClasses; ++c) first_of_class[c + 1] += first_of_class[c];
  for_each_tile([&](int64_t b, int64_t q, int32_t place) {
    tiles[first_of_class[place]++] = {static_cast<int32_t>(b), static_cast<int32_t>(q)};
  });
  *header = plan_header(p, num_segments, num_units, num_tiles);
}

}  // namespace fi::FI_ISA
