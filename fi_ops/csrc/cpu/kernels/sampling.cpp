// Sampling: what the filters keep (fi/cpu/filter_search.h), then a running sum over the candidates, or over
// chunk sums and inside one chunk.
#include "fi/sampling.h"

#include <type_traits>

#include "fi/cpu/filter_search.h"

namespace fi::FI_ISA {
namespace {

// The first candidate at which the cumulative weight exceeds uniform * mass.
int64_t draw_candidate(const Candidates& c, int64_t mass, float uniform) {
  int64_t left = draw_target(mass, uniform), i = 0;
  while (left >= c.weights[i]) left -= c.weights[i++];
  return c.ids[i];
}

}  // namespace

void top_k_top_p_sample(const SamplingParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.batch, [&](int64_t i, const Parallel& threads) {
    const SamplingDraw d = p.draw(i);
    with_source<true>(p, d, [&](const auto& source) {
      using Source = std::remove_cvref_t<decltype(source)>;
      with_row(source, p.vocab_size, threads, [&](WeightRow<Source>& row, RowScratch& scratch) {
        const Kept kept = FilterSearch<Source>{p, d, row, scratch}.run();
        switch (kept.keeps) {
          case Keeps::nothing:
            return p.write(i, 0, false);
          case Keeps::first:
            return p.write(i, row.argmax(), true);
          case Keeps::candidates:
            return p.write(i, draw_candidate(scratch.candidates, kept.mass, d.uniform), true);
          case Keeps::row:
            return p.write(i, row.draw(kept.cut, d.uniform), true);
        }
      });
    });
  });
}

}  // namespace fi::FI_ISA
