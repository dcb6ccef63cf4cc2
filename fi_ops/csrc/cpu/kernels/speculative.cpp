// Chain speculative sampling: a test a draft token, then one draw from what the target has over the draft.
#include "fi/speculative.h"

#include "fi/cpu/filter_search.h"

namespace fi::FI_ISA {
namespace {

// A token from a row of weights, less those of `minus` where it is not null; -1 where nothing can be drawn.
int64_t draw_from(const float* weights, const float* minus, int64_t n, float uniform,
                  const Parallel& parallel) {
  int64_t id = -1;
  with_row(Probs{weights, minus}, n, parallel, [&](WeightRow<Probs>& row, RowScratch&) {
    if (row.invalid || row.max == -kInf) return;
    row.set_weights(1.0f);
    row.sum_kept(Cut{});
    id = row.draw(Cut{}, uniform);
  });
  return id;
}

void sample_chain(const SpeculativeParams& p, int64_t b, const Parallel& parallel) {
  const int64_t num = p.num_speculative_tokens;
  int64_t emitted = 0, accepted = 0;
  for (int64_t i = 0; i < num; ++i) {
    const bool passes = p.accepts(b, i);
    accepted += passes;
    emitted += passes && emitted == i;
  }
  for (int64_t i = 0; i < emitted; ++i) p.write_id(b, i, p.draft_id(b, i));
  const float* target = p.target_row(b, emitted);
  const float uniform = p.uniform_at(b, num);
  int64_t id = -1;
  if (emitted < num) id = draw_from(target, p.draft_row(b, emitted), p.vocab_size, uniform, parallel);
  if (id < 0) id = draw_from(target, nullptr, p.vocab_size, uniform, parallel);
  p.write_id(b, emitted, id < 0 ? 0 : id);
  for (int64_t i = emitted + 1; i <= num; ++i) p.write_id(b, i, -1);
  p.accepted[b] = int32_t(accepted);
  p.emitted[b] = int32_t(emitted);
}

}  // namespace

void chain_speculative_sample(const SpeculativeParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.batch, [&](int64_t b, const Parallel& threads) { sample_chain(p, b, threads); });
}

}  // namespace fi::FI_ISA
