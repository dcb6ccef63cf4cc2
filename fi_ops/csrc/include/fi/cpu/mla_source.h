// What latent attention reads: a batch whose query and key rows lie in two places each, and whose values are
// the first part of their keys.
#pragma once

#include "fi/cpu/batch_source.h"
#include "fi/cpu/fp8_rows.h"
#include "fi/mla.h"

namespace fi::FI_ISA {

template <class T>
class MlaSource : public BatchSource<T> {
 public:
  explicit MlaSource(const MlaParams& params)
      : BatchSource<T>(params.batch), mla(params), ckv(params.batch.call.head_dim_vo) {}

  // A query's row, [q_nope | q_pe] and zeros up to `depth`, as products take it.
  template <class Query>
  void load_query(Query* row, int64_t depth, int64_t b, int64_t h, int64_t i) const {
    const int64_t n = this->request(b).q_begin + i, end = ckv + mla.head_dim_kpe;
    const T* nope = this->query(b, h, i);
    const T* pe = static_cast<const T*>(mla.q_pe) + n * mla.q_pe_stride_n + h * mla.q_pe_stride_h;
    if constexpr (__is_same(Query, T)) {
      __builtin_memcpy(row, nope, ckv * sizeof(T));
      if (mla.head_dim_kpe > 0) __builtin_memcpy(row + ckv, pe, mla.head_dim_kpe * sizeof(T));
    } else {
      const auto widen = [](Query* to, const T* from, int64_t size) {
        for_each_vec(size,
                     [&](int64_t d, int64_t count) { store_n(to + d, load_n(from + d, count), count); });
      };
      widen(row, nope, ckv);
      widen(row + ckv, pe, mla.head_dim_kpe);
    }
    for (int64_t d = end; d < depth; ++d) row[d] = Query{};
  }

  // Whether a key's parts are neighbours in the cache, of the queries' dtype.
  bool in_place() const {
    const BatchAttentionParams& p = mla.batch;
    return p.kv_dtype == Fp8::none &&
           (mla.head_dim_kpe == 0 ||
            (static_cast<const T*>(p.call.key) + ckv == mla.kpe && p.call.k_stride_n == mla.kpe_stride_n &&
             p.k_stride_page == mla.kpe_stride_page));
  }

  struct TileRows {
    const char **ckv, **kpe;
    int64_t count = 0;

    void carve(Carver& carver, int64_t tile) {
      ckv = carver.take<const char*>(tile + 1);  // of values: pairs of rows are multiplied
      kpe = carver.take<const char*>(tile);
    }
  };

  void locate(TileRows& rows, int64_t b, int64_t begin, int64_t n) const {
    const BatchAttentionParams& p = mla.batch;
    const int64_t element = element_size();
    rows.count = n;
    const int64_t ckv_step = p.call.k_stride_n * element, kpe_step = mla.kpe_stride_n * element;
    for (int64_t j = 0; j < n;) {
      const PageEntry at = key_entry(p, this->request(b), begin + j);
      const char* c = static_cast<const char*>(p.call.key) +
                      (at.page * p.k_stride_page + at.entry * p.call.k_stride_n) * element;
      const char* k = static_cast<const char*>(mla.kpe) +
                      (at.page * mla.kpe_stride_page + at.entry * mla.kpe_stride_n) * element;
      const int64_t left = j + p.table.page_size - at.entry, end = left < n ? left : n;
      for (; j < end; ++j, c += ckv_step, k += kpe_step) {
        rows.ckv[j] = c;
        rows.kpe[j] = k;
      }
    }
  }

  // Makes rows.ckv whole keys, [ckv | kpe], of dtype T: where they are not, in `buffer`.
  void join(TileRows& rows, T* buffer) const {
    if (in_place()) return;
    const int64_t kpe = mla.head_dim_kpe;
    const Fp8 format = mla.batch.kv_dtype;
    for (int64_t j = 0; j < rows.count; ++j, buffer += ckv + kpe) {
      if (format == Fp8::none) {
        __builtin_memcpy(buffer, rows.ckv[j], ckv * sizeof(T));
        if (kpe > 0) __builtin_memcpy(buffer + ckv, rows.kpe[j], kpe * sizeof(T));
      } else {
        convert_row(buffer, reinterpret_cast<const uint8_t*>(rows.ckv[j]), ckv, format);
        convert_row(buffer + ckv, reinterpret_cast<const uint8_t*>(rows.kpe[j]), kpe, format);
      }
      rows.ckv[j] = reinterpret_cast<const char*>(buffer);
    }
  }

  // Fetches rows evenly within `calls` calls: memory delivers them while something else is done. null: none.
  auto prefetch(const TileRows* rows, int64_t calls) const {
    const int64_t lines = ceil_div(ckv * element_size(), 64);
    const int64_t all_lines = lines + ceil_div(mla.head_dim_kpe * element_size(), 64);
    const int64_t count = rows ? rows->count : 0,
                  per_call = ceil_div(count * all_lines, calls > 0 ? calls : 1);
    return [=, j = int64_t{0}, line = int64_t{0}]() mutable {
      for (int64_t left = per_call; left > 0 && j < count;) {
        const char *c = rows->ckv[j], *k = rows->kpe[j];
        const int64_t end = line + left < all_lines ? line + left : all_lines;
        left -= end - line;
        for (; line < end; ++line)
          __builtin_prefetch(line < lines ? c + line * 64 : k + (line - lines) * 64, 0, 2);
        if (line == all_lines) ++j, line = 0;
      }
    };
  }

 private:
  int64_t element_size() const { return mla.batch.kv_dtype == Fp8::none ? sizeof(T) : 1; }

  const MlaParams& mla;
  int64_t ckv;
};

}  // namespace fi::FI_ISA
