// What top-k, top-p and min-p keep of a row: one threshold search, no sort (notes and measurements:
// docs/kernels/sampling_cpu.md).
//
// 1. scan: the maxima of all blocks. Enough for argmax, and for where a small top-k can lie.
// 2a. A small top-k: the k-th largest block maximum is a lower bound of the k-th value, so only tokens from
// there on (in about k blocks) are candidates; the rest of the row is never read again.
// 2b. Else a histogram of the weights (and counts) over 2048 buckets finds the bucket in which each filter
// ends; the tokens in that bucket are the candidates.
// 3. A radix search on the candidates finds each filter's last token.
#pragma once

#include "fi/cpu/sample_row.h"
#include "fi/sampling.h"

namespace fi::FI_ISA {

enum class Keeps {
  nothing,     // the row has values that can't be, or none that weighs something
  first,       // the first token in order alone: argmax
  candidates,  // the candidates with a weight
  row,         // what the cut keeps and weighs something; chunk_sums has its weight
};

struct Kept {
  Keeps keeps;
  Cut cut;           // the last token; but for min-p, which the source applies in weigh()
  int64_t mass = 0;  // the weight of all
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

template <class Source>
struct FilterSearch {
  const FilterParams& p;
  const SamplingDraw& d;
  WeightRow<Source>& row;
  RowScratch& scratch;
  bool use_top_k = false, use_top_p = false, min_p_last = false;

  // `row` has been scanned.
  Kept run() {
    if (row.invalid || row.max == -kInf) return {Keeps::nothing, {}};
    use_top_k = d.top_k > 0 && d.top_k < row.n;
    use_top_p = d.top_p < 1.0;
    if (d.temperature == 0.0f || d.top_p == 0.0 || (d.top_k == 1 && p.exact_ties)) return {Keeps::first, {}};

    row.set_weights(d.temperature);
    min_p_last = use_top_p && !p.min_p_first && d.min_p > 0.0;
    if (!min_p_last) row.source.set_min_p(d.min_p, d.temperature);

    if (!use_top_k && !use_top_p) {
      const Cut all;
      if (!Source::kHasWeights) return {Keeps::row, all};
      row.sum_kept(all);
      return {Keeps::row, all, row.total_of_chunks()};
    }
    if (use_top_k && d.top_k <= row.num_blocks() / 2) return among_candidates(bucket_of_top_k());
    if (row.n <= kChunk / 2) {  // clearing and walking a histogram would cost more than it saves
      row.set_buckets_of_row();
      return among_candidates(kBuckets - 1);
    }
    return by_histogram();
  }

 private:
  // A bucket by which top_k blocks, so at least top_k tokens, have their maximum. Needs as many blocks with a
  // finite one; with fewer it is the last bucket.
  int32_t bucket_of_top_k() {
    float low = row.max;
    for (int64_t block = 0; block < row.num_blocks(); ++block) {
      const float x = scratch.block_max[block];
      if (x < low && x > -kInf) low = x;
    }
    row.set_buckets(Source::coordinate(row.max), Source::coordinate(low));
    __builtin_memset(scratch.counts, 0, sizeof(int32_t) * kBuckets);
    for (int64_t block = 0; block < row.num_blocks(); ++block) scratch.counts[row.first_bucket(block)] += 1;
    int64_t before;
    const int32_t b = find_bucket(scratch.counts, d.top_k, before);
    return b < kBuckets ? b : kBuckets - 1;
  }

  // Where everything that top-k keeps (or the whole row) is in the buckets up to `last`.
  Kept among_candidates(int32_t last) {
    Candidates& c = scratch.candidates;
    int64_t mass = 0;
    if (!p.top_k_first && use_top_p) {  // the mass of the whole row
      row.sum_kept(Cut{});
      mass = row.total_of_chunks();
    }
    row.collect(0, last);
    Cut cut = use_top_k ? select_prefix<true>(c, d.top_k, p.exact_ties, scratch.bins) : Cut{};
    int64_t kept = keep_prefix(c, cut);
    if (use_top_p) {
      if (p.top_k_first) mass = kept;
      const Cut by_mass = select_prefix<false>(c, mass_target(d.top_p, mass), true, scratch.bins);
      kept = keep_prefix(c, by_mass);
      if (!by_mass.keeps_all()) cut = by_mass;
      if (min_p_last) {
        row.source.set_min_p(d.min_p, d.temperature);
        kept = 0;
        for (int64_t i = 0; i < c.size; ++i) {
          if (!row.source.is_eligible(key_logit(c.keys[i]))) c.weights[i] = 0;
          kept += c.weights[i];
        }
      }
    }
    return {Keeps::candidates, cut, kept};
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

  Kept by_histogram() {
    Candidates& c = scratch.candidates;
    row.set_buckets_of_row();
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
      if (min_p_last) {
        row.source.set_min_p(d.min_p, d.temperature);
        collected = kBuckets;
      }
    }
    if (!Source::kHasWeights) return {Keeps::row, cut};
    if (collected == kBuckets) {
      row.sum_kept(cut);
    } else {
      for (int64_t i = 0; i < c.size; ++i) {
        if (cut.keeps(c.keys[i], c.ids[i])) scratch.chunk_sums[c.ids[i] / kChunk] += c.weights[i];
      }
    }
    return {Keeps::row, cut, row.total_of_chunks()};
  }
};

// f(i, parallel) for each of `count` rows. As many as come out even have a thread each; the threads share the
// rows of the rest. Sums are exact, so the answer is the same either way.
template <class F>
void for_each_row(const Parallel& parallel, int64_t count, const F& f) {
  const int64_t alone = count - count % parallel.num_threads;
  const Parallel one{nullptr, 1};
  for_each_task(parallel, alone, [&](int64_t i) { f(i, one); });
  for (int64_t i = alone; i < count; ++i) f(i, parallel);
}

// f(row, scratch): a row and its scratch, for as long as f runs.
template <class Source, class F>
void with_row(const Source& source, int64_t n, const Parallel& parallel, const F& f) {
  RowScratch scratch(n, WeightRow<Source>::num_histograms(n, parallel));
  WeightRow<Source> row{source, n, parallel, scratch};
  row.scan();
  f(row, scratch);
  scratch.release();
}

// f(source) with the row of draw d, from logits (kWeighs: or their order) or probabilities.
template <bool kWeighs, class F>
void with_source(const FilterParams& p, const SamplingDraw& d, const F& f) {
  const int64_t offset = d.row * p.row_stride;
  switch (p.dtype) {
    case DType::bf16:
      return f(Logits<bf16, kWeighs>{static_cast<const bf16*>(p.input) + offset});
    case DType::f16:
      return f(Logits<f16, kWeighs>{static_cast<const f16*>(p.input) + offset});
    default:
      if constexpr (kWeighs) {
        if (p.from_probs) return f(Probs{static_cast<const float*>(p.input) + offset});
      }
      return f(Logits<float, kWeighs>{static_cast<const float*>(p.input) + offset});
  }
}

}  // namespace fi::FI_ISA
