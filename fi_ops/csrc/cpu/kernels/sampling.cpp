// Sampling from logits: one threshold search a row, no sort (notes and measurements:
// docs/kernels/sampling_cpu.md).
//
// 1. scan: the maxima of all blocks. Enough for argmax, and for where a small top-k can lie.
// 2a. A small top-k: the k-th largest block maximum is a lower bound of the k-th logit, so only tokens from
// there on (in
//     about k blocks) are candidates; the rest of the row is never read again.
// 2b. Else a histogram of the weights (and counts) over 2048 buckets finds the bucket in which each filter
// ends; the tokens
//     in that bucket are the candidates.
// 3. A radix search on the candidates finds each filter's last token.
// 4. The draw: a running sum over the candidates (2a), or over chunk sums and then inside one chunk (2b).
#include "fi/sampling.h"

#include "fi/cpu/sample_row.h"

namespace fi::FI_ISA {
namespace {

struct Outcome {
  int64_t id;
  bool valid;
};

// First b with the sum of values[0..b] >= target; `before` is the sum in front of it. kBuckets if there is
// none.
template <class V>
int32_t find_bucket(const V* values, int64_t target, int64_t& before) {
  before = 0;
  for (int32_t b = 0; b < kBuckets; ++b) {
    if (before + values[b] >= target) return b;
    before += values[b];
  }
  return kBuckets;
}

template <class T>
struct Sampler {
  const SamplingParams& p;
  const SamplingDraw& d;
  LogitRow<T>& row;
  RowScratch& scratch;
  bool use_top_k, use_top_p;
  float min_p_distance;  // kInf: none

  Outcome run() {
    row.scan();
    if (row.has_nan || row.max == -kInf) return {0, false};
    use_top_k = d.top_k > 0 && d.top_k < row.n;
    use_top_p = d.top_p < 1.0;
    if (d.temperature == 0.0f || d.top_p == 0.0 || (d.top_k == 1 && p.exact_ties))
      return {row.argmax(), true};

    row.set_weights(d.temperature);
    // p >= min_p * max(p), as a distance from the largest logit: a prefix, as the other filters are
    min_p_distance = d.min_p > 0.0 ? float(-double(d.temperature) * __builtin_log(d.min_p)) : kInf;
    if (p.top_k_first || !use_top_p) row.eligible = min_p_distance;

    if (!use_top_k && !use_top_p) {
      const Cut all;
      row.sum_kept(all);
      return {row.draw(all, d.uniform), true};
    }
    if (row.n <= 4 * kChunk) {
      row.set_buckets(row.max, row.min);
      return {among_candidates(kBuckets - 1), true};
    }
    if (use_top_k && d.top_k <= row.num_blocks() / 2) return {among_candidates(bucket_of_top_k()), true};
    return {by_histogram(), true};
  }

  // A bucket by which top_k blocks, so at least top_k tokens, have their maximum. Needs as many blocks with a
  // finite one; with fewer it is the last bucket.
  int32_t bucket_of_top_k() {
    float low = row.max;
    for (int64_t block = 0; block < row.num_blocks(); ++block) {
      const float x = scratch.block_max[block];
      if (x < low && x > -kInf) low = x;
    }
    row.set_buckets(row.max, low);
    __builtin_memset(scratch.counts, 0, sizeof(int32_t) * kBuckets);
    for (int64_t block = 0; block < row.num_blocks(); ++block) scratch.counts[row.first_bucket(block)] += 1;
    int64_t before;
    const int32_t b = find_bucket(scratch.counts, d.top_k, before);
    return b < kBuckets ? b : kBuckets - 1;
  }

  // The draw, where everything that top-k keeps (or the whole row) is in the buckets up to `last`.
  int64_t among_candidates(int32_t last) {
    Candidates& c = scratch.candidates;
    int64_t mass = 0;
    if (!p.top_k_first && use_top_p) {  // joint: the mass of the whole row
      row.sum_kept(Cut{});
      mass = row.total_of_chunks();
    }
    row.collect(0, last);
    const Cut by_count = use_top_k ? select_prefix<true>(c, d.top_k, p.exact_ties, scratch.bins) : Cut{};
    int64_t kept = keep_prefix(c, by_count);
    if (use_top_p) {
      if (p.top_k_first) mass = kept;
      kept = keep_prefix(c, select_prefix<false>(c, mass_target(d.top_p, mass), true, scratch.bins));
      if (!p.top_k_first && min_p_distance < kInf) {
        kept = 0;
        for (int64_t i = 0; i < c.size; ++i) {
          if (!(row.max - key_logit(c.keys[i]) <= min_p_distance)) c.weights[i] = 0;
          kept += c.weights[i];
        }
      }
    }
    int64_t left = draw_target(kept, d.uniform), i = 0;
    while (left >= c.weights[i]) left -= c.weights[i++];
    return c.ids[i];
  }

  // The bucket in which the count (or weight) of tokens reaches `target`, `before` what is in front of it. A
  // crowded bucket is cut into buckets of its own, twice at most (not for ties, which that doesn't part);
  // sets `collected` back then.
  template <bool ByCount>
  int32_t find_end(int64_t target, int64_t& before, int32_t& collected) {
    double crowd_before = 1e30;
    for (int zooms = 0;; ++zooms) {
      const int32_t b =
          ByCount ? find_bucket(scratch.counts, target, before) : find_bucket(scratch.masses, target, before);
      if (b == kBuckets || zooms == 2) return b;
      const double crowd = ByCount ? double(scratch.counts[b]) : row.crowd(b, scratch.masses[b]);
      if (crowd <= kCrowded || crowd > 0.5 * crowd_before || !row.zoom_into(b)) return b;
      crowd_before = crowd;
      row.template fill_histogram<ByCount>();
      collected = kBuckets;
    }
  }

  int64_t by_histogram() {
    Candidates& c = scratch.candidates;
    row.set_buckets(row.max, row.min);
    use_top_k ? row.template fill_histogram<true>() : row.template fill_histogram<false>();
    int64_t mass = 0;  // top-p's whole
    for (int b = 0; b < kBuckets; ++b) mass += scratch.masses[b];

    Cut cut;
    int32_t collected = kBuckets;  // the bucket whose tokens are the candidates
    int64_t kept = mass;           // the mass that top-k keeps
    if (use_top_k) {
      int64_t before;
      const int32_t b = find_end<true>(d.top_k, before, collected);
      if (b < kBuckets) {
        row.collect(b, b);
        collected = b;
        cut = select_prefix<true>(c, d.top_k - before, p.exact_ties, scratch.bins);
        kept = row.total_of_chunks();
        for (int64_t i = 0; i < c.size; ++i) kept += cut.keeps(c.keys[i], c.ids[i]) ? c.weights[i] : 0;
      }
    }
    if (use_top_p) {
      const int64_t target = mass_target(d.top_p, p.top_k_first ? kept : mass);
      if (target <= kept) {
        int64_t before;
        const int32_t b = find_end<false>(target, before, collected);
        if (b != collected) row.collect(b, b);
        collected = b;
        cut = select_prefix<false>(c, target - before, true, scratch.bins);
      }
      if (!p.top_k_first && min_p_distance < kInf) {
        row.eligible = min_p_distance;
        collected = kBuckets;
      }
    }
    if (collected == kBuckets) {
      row.sum_kept(cut);
    } else {
      for (int64_t i = 0; i < c.size; ++i) {
        if (cut.keeps(c.keys[i], c.ids[i])) scratch.chunk_sums[c.ids[i] / kChunk] += c.weights[i];
      }
    }
    return row.draw(cut, d.uniform);
  }
};

template <class T>
void sample_one(const SamplingParams& p, int64_t i, const Parallel& parallel) {
  const SamplingDraw d = p.draw(i);
  RowScratch scratch(p.vocab_size, LogitRow<T>::num_histograms(p.vocab_size, parallel));
  LogitRow<T> row{static_cast<const T*>(p.logits) + d.row * p.row_stride, p.vocab_size, parallel, scratch};
  const Outcome outcome = Sampler<T>{p, d, row, scratch, false, false, kInf}.run();
  scratch.release();
  p.write(i, outcome.id, outcome.valid);
}

template <class T>
void sample_all(const SamplingParams& p, const Parallel& parallel) {
  // As many draws as come out even have a thread each; the threads share the rows of the rest. Sums are
  // exact, so the answer is the same either way.
  const int64_t alone = p.batch - p.batch % parallel.num_threads;
  for_each_task(parallel, alone, [&](int64_t i) { sample_one<T>(p, i, Parallel{nullptr, 1}); });
  for (int64_t i = alone; i < p.batch; ++i) sample_one<T>(p, i, parallel);
}

}  // namespace

void top_k_top_p_sample(const SamplingParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::bf16:
      return sample_all<bf16>(p, parallel);
    case DType::f16:
      return sample_all<f16>(p, parallel);
    default:
      return sample_all<float>(p, parallel);
  }
}

}  // namespace fi::FI_ISA
