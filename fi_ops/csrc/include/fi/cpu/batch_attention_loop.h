// Attention over a batch: its requests with few rows stream, the others' keys are packed, all in one pool of
// tasks.
#pragma once

#include "fi/cpu/attention_loop.h"
#include "fi/cpu/batch_source.h"

namespace fi::FI_ISA {

// Rows that no request has: 0 and -inf.
template <class T>
void clear_tokens(const AttentionParams& c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t h = 0; h < c.num_qo_heads; ++h) {
      __builtin_memset(static_cast<T*>(c.out) + i * c.o_stride_n + h * c.o_stride_h, 0,
                       c.head_dim_vo * sizeof(T));
      if (c.lse) c.lse[i * c.num_qo_heads + h] = -kInf;
    }
  }
}

// add(r) for each request that has queries; the tokens of none are cleared.
template <class T, class Add>
void add_requests(const BatchAttentionParams& p, const Add& add) {
  int64_t done = 0;  // tokens before are of a request or cleared
  for (int64_t b = 0; b < p.call.batch; ++b) {
    const Request r = request_of(p, b);
    if (r.qo_len == 0) continue;
    clear_tokens<T>(p.call, done, r.q_begin);
    done = r.q_begin + r.qo_len;
    add(r);
  }
  clear_tokens<T>(p.call, done, p.call.qo_len);
}

template <class T, class Unit>
void run_batch_attention(const BatchAttentionParams& p, const Parallel& parallel) {
  const AttentionParams& c = p.call;
  if (c.qo_len == 0 || c.num_qo_heads == 0) return;
  using Source = BatchSource<T>;
  Source few(p), many(p);
  add_requests<T>(p, [&](const Request& r) {
    (c.num_qo_heads / c.num_kv_heads * r.qo_len <= Stream<T>::kMaxRows ? few : many).add(r);
  });

  few.sort();
  many.sort();
  AttentionCall<T, Packed<T, Unit>, Source> packed(c, many, parallel);
  AttentionCall<T, Stream<T>, Source> streamed(c, few, parallel);
  packed.prepare();
  streamed.prepare();
  run_phases(c.scratch, parallel, packed.packing());
  run_phases(c.scratch, parallel, packed.attending(), streamed.attending());
  packed.merge();
  streamed.merge();
}

}  // namespace fi::FI_ISA
