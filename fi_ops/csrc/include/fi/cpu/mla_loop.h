// Latent attention: the attention loop over joined rows. The query heads of a token are the rows of a block,
// so a row of the cache is read and packed once for all of them, and packed it is however few they are: a
// row is so wide that packing is little beside reading it.
#pragma once

#include "fi/cpu/batch_attention_loop.h"
#include "fi/cpu/mla_source.h"

namespace fi::FI_ISA {

template <class T, class Unit>
void run_mla(const MlaParams& p, const Parallel& parallel) {
  if (p.batch.call.qo_len == 0 || p.batch.call.num_qo_heads == 0) return;
  BatchAttentionParams joined = p.batch;
  AttentionParams& c = joined.call;
  c.head_dim_qk += p.head_dim_kpe;
  MlaSource<T> source(p, joined);
  add_requests<T>(joined, [&](const Request& r) { source.add(r); });
  source.sort();
  AttentionCall<T, Packed<T, Unit>, MlaSource<T>> call(c, source, parallel);
  call.prepare();
  run_phases(c.scratch, parallel, call.packing());
  run_phases(c.scratch, parallel, call.attending());
  call.merge();
}

}  // namespace fi::FI_ISA
