// Attention over a dense batch: all of its requests have as many rows, so one engine does all.
#pragma once

#include "fi/cpu/attention_loop.h"

namespace fi::FI_ISA {

template <class T, class Unit>
void run_attention(const AttentionParams& p, const Parallel& parallel) {
  if (p.batch == 0 || p.num_qo_heads == 0 || p.qo_len == 0) return;
  DenseSource<T> source(p, parallel);
  auto run = [&](auto&& call) {
    call.prepare();
    run_phases(p.scratch, parallel, call.packing());
    run_phases(p.scratch, parallel, call.attending());
    call.merge();
  };
  if (p.num_qo_heads / p.num_kv_heads * p.qo_len <= Stream<T>::kMaxRows) {
    run(AttentionCall<T, Stream<T>, DenseSource<T>>(p, source, parallel));
  } else {
    run(AttentionCall<T, Packed<T, Unit>, DenseSource<T>>(p, source, parallel));
  }
}

}  // namespace fi::FI_ISA
