// What latent attention reads: a batch whose query and key rows lie in two places each, and whose values are
// the first part of their keys. A key's parts are joined in a tile's buffer, read once for keys and values.
#pragma once

#include "fi/cpu/batch_source.h"
#include "fi/cpu/fp8_rows.h"
#include "fi/mla.h"

namespace fi::FI_ISA {

template <class T>
class MlaSource : public BatchSource<T> {
  using Base = BatchSource<T>;

 public:
  using Rows = typename Base::Rows;
  static constexpr bool kLatent = true;

  // `batch`: the params' batch, as a loop over joined rows takes it.
  MlaSource(const MlaParams& params, const BatchAttentionParams& batch)
      : Base(batch), mla(params), ckv(params.batch.call.head_dim_vo) {}

  const T* query(int64_t b, int64_t h, int64_t i, T* row) const {
    const int64_t n = this->request(b).q_begin + i;
    const T* pe = static_cast<const T*>(mla.q_pe) + n * mla.q_pe_stride_n + h * mla.q_pe_stride_h;
    __builtin_memcpy(row, Base::query(b, h, i, nullptr), ckv * sizeof(T));
    __builtin_memcpy(row + ckv, pe, mla.head_dim_kpe * sizeof(T));
    return row;
  }

  struct TileRows {
    const char **ckv, **kpe;
    int64_t count = 0;
    Rows keys, values;

    void carve(Carver& carver, int64_t tile) {
      ckv = carver.take<const char*>(tile);
      kpe = carver.take<const char*>(tile);
      keys = values = {ckv};
    }
  };

  void locate(TileRows& rows, int64_t b, int64_t, int64_t begin, int64_t n) const {
    const BatchAttentionParams& p = mla.batch;
    const int64_t element = p.kv_dtype == Fp8::none ? sizeof(T) : 1;
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

  // n keys, each [ckv | kpe], in `buffer`.
  void join(T* buffer, const TileRows& rows, int64_t n) const {
    const int64_t kpe = mla.head_dim_kpe;
    for (int64_t j = 0; j < n; ++j, buffer += ckv + kpe) {
      if (mla.batch.kv_dtype == Fp8::none) {
        __builtin_memcpy(buffer, rows.ckv[j], ckv * sizeof(T));
        __builtin_memcpy(buffer + ckv, rows.kpe[j], kpe * sizeof(T));
      } else {
        convert_row(buffer, reinterpret_cast<const uint8_t*>(rows.ckv[j]), ckv, mla.batch.kv_dtype);
        convert_row(buffer + ckv, reinterpret_cast<const uint8_t*>(rows.kpe[j]), kpe, mla.batch.kv_dtype);
      }
    }
  }

  // Fetches rows in `steps` even steps, one a call: memory delivers them while the calls do something else.
  auto prefetch(const TileRows* rows, int64_t steps) const {
    const int64_t element = mla.batch.kv_dtype == Fp8::none ? sizeof(T) : 1;
    const int64_t lines = ceil_div(ckv * element, 64), more_lines = ceil_div(mla.head_dim_kpe * element, 64);
    const int64_t count = rows ? rows->count : 0, per_step = ceil_div(count * (lines + more_lines), steps);
    return [=, j = int64_t{0}, line = int64_t{0}]() mutable {
      for (int64_t n = 0; n < per_step && j < count; ++n) {
        __builtin_prefetch(line < lines ? rows->ckv[j] + line * 64 : rows->kpe[j] + (line - lines) * 64, 0,
                           2);
        if (++line == lines + more_lines) ++j, line = 0;
      }
    };
  }

 private:
  const MlaParams& mla;
  int64_t ckv;
};

}  // namespace fi::FI_ISA
