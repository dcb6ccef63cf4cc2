// The largest values of a row: where the k-th lies (fi/cpu/filter_search.h), what is kept by id, a radix sort
// of that. Log-probabilities: the same, and the row's sum of weights.
#include "fi/top_k.h"

#include "fi/cpu/filter_search.h"

namespace fi::FI_ISA {
namespace {

// Makes all tokens candidates, NaN in front. For rows that the search can't part: NaN, or -inf among the k.
template <class T>
void collect_all(const T* data, int64_t n, Candidates& c) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(data[i]);
    c.keys[i] = x == x ? order_key(x + 0.0f) : 0u;
    c.ids[i] = int32_t(i);
  }
  c.size = n;
}

// Makes the k first tokens in order the candidates, by id; the row has been scanned.
template <class T>
void collect_first(WeightRow<Logits<T, false>>& row, RowScratch& scratch, int64_t k) {
  Candidates& c = scratch.candidates;
  c.size = 0;
  Cut cut;
  if (!row.invalid && k < row.n) {
    FilterParams p{};
    p.top_k_first = p.exact_ties = true;
    const SamplingDraw d{0, k, 1.0, 0.0, 1.0f, 0.0f};
    const Kept kept = FilterSearch<Logits<T, false>>{p, d, row, scratch}.run();
    if (kept.keeps == Keeps::first) {
      const int64_t id = row.argmax();
      c.keys[0] = order_key(to_float(row.source.data[id]) + 0.0f);
      c.ids[0] = int32_t(id);
      c.size = 1;
    } else if (kept.keeps == Keeps::row) {
      row.collect_kept(kept.cut);
    }
  }
  if (c.size == k) return;
  collect_all(row.source.data, row.n, c);
  keep_prefix(c, select_prefix<true>(c, k, true, scratch.bins));
}

// Sorts candidates that are in the order of ids by key: radix, stable.
void sort_candidates(Candidates& c) {
  auto* memory = static_cast<uint32_t*>(__builtin_malloc(sizeof(uint32_t) * 2 * size_t(c.size)));
  uint32_t *keys = c.keys, *other_keys = memory;
  int32_t *ids = c.ids, *other_ids = reinterpret_cast<int32_t*>(memory + c.size);
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t starts[256] = {};
    for (int64_t i = 0; i < c.size; ++i) ++starts[keys[i] >> shift & 255];
    if (starts[keys[0] >> shift & 255] == c.size) continue;
    int64_t before = 0;
    for (int64_t& start : starts) {
      const int64_t count = start;
      start = before;
      before += count;
    }
    for (int64_t i = 0; i < c.size; ++i) {
      const int64_t to = starts[keys[i] >> shift & 255]++;
      other_keys[to] = keys[i];
      other_ids[to] = ids[i];
    }
    uint32_t* const k = keys;
    keys = other_keys;
    other_keys = k;
    int32_t* const t = ids;
    ids = other_ids;
    other_ids = t;
  }
  if (ids != c.ids) {
    __builtin_memcpy(c.ids, ids, sizeof(*ids) * size_t(c.size));
    __builtin_memcpy(c.keys, keys, sizeof(*keys) * size_t(c.size));
  }
  __builtin_free(memory);
}

template <class T>
void top_k_row(const TopKParams& p, int64_t i, const Parallel& parallel) {
  const T* data = static_cast<const T*>(p.input) + i * p.row_stride;
  T* values = static_cast<T*>(p.values) + i * p.k;
  int64_t* indices = p.indices + i * p.k;
  with_row(Logits<T, false>{data}, p.vocab_size, parallel, [&](auto& row, RowScratch& scratch) {
    Candidates& c = scratch.candidates;
    collect_first(row, scratch, p.k);
    if (p.sorted) sort_candidates(c);
    for (int64_t j = 0; j < p.k; ++j) {
      values[j] = data[c.ids[j]];
      indices[j] = c.ids[j];
    }
  });
}

// How many tokens come before token `id` in order.
template <class T>
int64_t tokens_before(const WeightRow<Logits<T, false>>& row, int64_t id) {
  const float chosen = to_float(row.source.data[id]) + 0.0f;
  const Vec high = set1(chosen);
  const bool is_nan = chosen != chosen;
  int64_t count = 0;
  row.for_each_raw(0, row.n, [&](int64_t i, Vec raw, int64_t lanes) {
    const VecI nan = raw != raw, in = iota_i() < int32_t(lanes), front = iota_i() + int32_t(i) < int32_t(id);
    const VecI before = is_nan ? nan & front : nan | (raw > high) | ((raw == high) & front);
    count += __builtin_popcount(mask_bits(before & in));
  });
  return count;
}

template <class T>
void logprobs_row(const LogprobsParams& p, int64_t i, const Parallel& parallel) {
  const T* data = static_cast<const T*>(p.logits) + i * p.row_stride;
  const float nan = __builtin_nanf("");
  const int64_t id = p.token_ids.at(i), n = p.vocab_size;
  float* const top_logprobs = p.top_logprobs + i * p.num_top;
  with_row(Logits<T>{data}, n, parallel, [&](WeightRow<Logits<T>>& weighed, RowScratch& scratch) {
    double lse = 0;  // less the maximum
    const bool sums = !weighed.invalid && weighed.max > -kInf;
    if (sums) {
      weighed.set_weights(1.0f);
      weighed.sum_kept(Cut{});
      lse = __builtin_log(double(weighed.total_of_chunks()) / double(weighed.source.unit_scale()));
    }
    auto logprob = [&](int64_t token) {
      if (!sums) return nan;
      const float x = to_float(data[token]);
      if (weighed.source.infinite) return x == kInf ? float(-lse) : -kInf;
      return float(double(x) - double(weighed.max) - lse);
    };
    // What comes first is a matter of the values, infinite or not.
    WeightRow<Logits<T, false>> row{Logits<T, false>{data}, n, parallel, scratch};
    if (weighed.source.infinite) {
      row.scan();
    } else {
      row.adopt(weighed);
    }
    p.logprobs[i] = logprob(id);
    p.write_id(p.ranks, i, 1 + tokens_before(row, id));
    if (p.num_top == 0) return;
    collect_first(row, scratch, p.num_top);
    sort_candidates(scratch.candidates);
    for (int64_t j = 0; j < p.num_top; ++j) {
      const int32_t token = scratch.candidates.ids[j];
      top_logprobs[j] = logprob(token);
      p.write_id(p.top_ids, i * p.num_top + j, token);
    }
  });
}

}  // namespace

void top_k(const TopKParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.rows, [&](int64_t i, const Parallel& threads) {
    switch (p.dtype) {
      case DType::bf16:
        return top_k_row<bf16>(p, i, threads);
      case DType::f16:
        return top_k_row<f16>(p, i, threads);
      default:
        return top_k_row<float>(p, i, threads);
    }
  });
}

void gather_logprobs(const LogprobsParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.rows, [&](int64_t i, const Parallel& threads) {
    switch (p.dtype) {
      case DType::bf16:
        return logprobs_row<bf16>(p, i, threads);
      case DType::f16:
        return logprobs_row<f16>(p, i, threads);
      default:
        return logprobs_row<float>(p, i, threads);
    }
  });
}

}  // namespace fi::FI_ISA
