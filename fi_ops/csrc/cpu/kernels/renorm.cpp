// Filtered distributions written out: what the filters keep (fi/cpu/filter_search.h), then one pass that
// writes.
#include <type_traits>

#include "fi/cpu/filter_search.h"
#include "fi/cpu/rowops.h"
#include "fi/sampling.h"

namespace fi::FI_ISA {
namespace {

template <class T>
void fill(T* output, int64_t n, float value) {
  for_each_vec(n, [&](int64_t i, int64_t count) { store_n(output + i, set1(value), count); });
}

// f(i, raw, x, kept, count) for each vector of the row, as it is and canonical, on several threads where the
// work is worth it; `kept` is the mask of those that the cut keeps.
template <class Row, class F>
void for_each_kept(const Row& row, Cut cut, const F& f) {
  const float lowest = cut.lowest();
  row.for_each_part(true, [&](int64_t part) {
    row.for_each_block(part, [&](int64_t, int64_t begin, int64_t end) {
      row.for_each_raw(begin, end, [&](int64_t i, Vec raw, int64_t count) {
        const Vec x = row.source.canonical(raw);
        f(i, raw, x, row.kept(x, i, lowest, cut.last_id), count);
      });
    });
  });
}

// Without top-k and top-p the weights are written as they are summed, and made probabilities after.
template <class Source>
void renorm_all(WeightRow<Source>& row, const SamplingDraw& d, float* output) {
  row.set_weights(d.temperature);
  row.source.set_min_p(d.min_p, d.temperature);
  const Source source = row.source;
  row.for_each_part(true, [&](int64_t part) {
    FixedSum sum;
    row.for_each_block(part, [&](int64_t, int64_t begin, int64_t end) {
      row.for_each_vec(begin, end, [&](int64_t i, Vec x, int64_t count) {
        const Vec w = select(source.is_eligible(x), source.real_weight(x), zero());
        sum.add(w * source.unit_scale());
        store_n(output + i, w, count);
      });
    });
    row.scratch.part_sizes[part] = sum.total();
  });
  int64_t mass = 0;
  for (int64_t part = 0; part < row.num_parts(); ++part) mass += row.scratch.part_sizes[part];
  const float scale = float(double(source.unit_scale()) / double(mass));
  row.for_each_part(true, [&](int64_t part) {
    row.for_each_block(part, [&](int64_t, int64_t begin, int64_t end) {
      for_each_vec(end - begin, [&](int64_t i, int64_t count) {
        store_n(output + begin + i, load_n(output + begin + i, count) * scale, count);
      });
    });
  });
}

}  // namespace

void renorm_probs(const RenormParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.batch, [&](int64_t i, const Parallel& threads) {
    const SamplingDraw d = p.draw(i);
    float* output = static_cast<float*>(p.output) + i * p.vocab_size;
    with_source<true>(p, d, [&](const auto& source) {
      using Source = std::remove_cvref_t<decltype(source)>;
      with_row(source, p.vocab_size, threads, [&](WeightRow<Source>& row, RowScratch& scratch) {
        const bool filters = (d.top_k > 0 && d.top_k < row.n) || d.top_p < 1.0 || d.temperature == 0.0f;
        if (!filters && !row.invalid && row.max > -kInf) return renorm_all(row, d, output);
        const Kept kept = FilterSearch<Source>{p, d, row, scratch}.run();
        if (kept.keeps == Keeps::nothing) return fill(output, row.n, __builtin_nanf(""));
        if (kept.keeps == Keeps::first) {
          fill(output, row.n, 0.0f);
          output[row.argmax()] = 1.0f;
          return;
        }
        // Weights before they are cut to integers: small probabilities keep their digits.
        const float scale = float(double(row.source.unit_scale()) / double(kept.mass));
        for_each_kept(row, kept.cut, [&](int64_t at, Vec, Vec x, VecI in, int64_t count) {
          const Vec probs = row.source.real_weight(x) * scale;
          store_n(output + at, select(in & row.source.is_eligible(x), probs, zero()), count);
        });
      });
    });
  });
}

void top_k_mask_logits(const RenormParams& p, const Parallel& parallel) {
  for_each_row(parallel, p.batch, [&](int64_t i, const Parallel& threads) {
    const SamplingDraw d = p.draw(i);
    with_source<false>(p, d, [&](const auto& source) {
      using Source = std::remove_cvref_t<decltype(source)>;
      using T = std::remove_cvref_t<decltype(*source.data)>;
      T* output = static_cast<T*>(p.output) + i * p.vocab_size;
      with_row(source, p.vocab_size, threads, [&](WeightRow<Source>& row, RowScratch& scratch) {
        if (row.invalid) return fill(output, row.n, __builtin_nanf(""));
        Kept kept = FilterSearch<Source>{p, d, row, scratch}.run();
        if (kept.keeps == Keeps::first) {
          fill(output, row.n, -kInf);
          const int64_t id = row.argmax();
          output[id] = source.data[id];
          return;
        }
        // Nothing but -inf has no cut: it stays what it is.
        for_each_kept(row, kept.cut, [&](int64_t at, Vec raw, Vec, VecI in, int64_t count) {
          store_n(output + at, select(in, raw, set1(-kInf)), count);
        });
      });
    });
  });
}

}  // namespace fi::FI_ISA
