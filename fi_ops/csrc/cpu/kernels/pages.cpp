// Paged KV caches on the CPU: appending tokens, copying pages, the index tensors of a batch.
#include "fi/pages.h"

#include "fi/cpu/rope_table.h"

namespace fi::FI_ISA {
namespace {

template <class T>
FI_INLINE void store_fp8(const T* x, void* y, int64_t n, Fp8 format) {
  auto* bytes = static_cast<uint8_t*>(y);
  if (format == Fp8::e4m3) {
    for (int64_t i = 0; i < n; ++i) bytes[i] = to_e4m3(to_float(x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) bytes[i] = to_e5m2(to_float(x[i]));
  }
}

template <class T>
FI_INLINE void store_row(const T* x, void* y, int64_t n, Fp8 format) {
  if (format == Fp8::none) {
    __builtin_memcpy(y, x, n * sizeof(T));
  } else {
    store_fp8(x, y, n, format);
  }
}

// One token's heads, as they are.
template <class T>
FI_INLINE void append_token(const PagedRows& rows, int64_t n, const PageEntry& at, int64_t num_heads,
                            Fp8 format) {
  if (num_heads * rows.head_dim == 0) return;
  const int64_t size = format == Fp8::none ? sizeof(T) : 1;
  const T* x = static_cast<const T*>(rows.input) + rows.input_offset(n, 0);
  char* y = static_cast<char*>(rows.cache) + rows.cache_offset(at, 0) * size;
  // Heads that are neighbours on both sides are one run.
  const bool together = rows.input_stride_h == rows.head_dim && rows.cache_stride_h == rows.head_dim;
  const int64_t runs = together ? 1 : num_heads, run = together ? num_heads * rows.head_dim : rows.head_dim;
  for (int64_t h = 0; h < runs; ++h)
    store_row(x + h * rows.input_stride_h, y + h * rows.cache_stride_h * size, run, format);
}

// One token's keys, rotated in fp32 and rounded once. `row`: head_dim floats.
template <class T>
FI_INLINE void append_rotated(const AppendPagesParams& p, int64_t n, const PageEntry& at,
                              const RopeAngles& angles, float* row) {
  const PagedRows& rows = p.key;
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const T* x = static_cast<const T*>(rows.input) + rows.input_offset(n, h);
    const int64_t to = rows.cache_offset(at, h);
    if (p.cache_dtype == Fp8::none) {
      rotate_row(x, static_cast<T*>(rows.cache) + to, angles, p.rope.rotary_dim, rows.head_dim,
                 p.rope.interleaved);
    } else {
      rotate_row(x, row, angles, p.rope.rotary_dim, rows.head_dim, p.rope.interleaved);
      store_fp8(row, static_cast<uint8_t*>(rows.cache) + to, rows.head_dim, p.cache_dtype);
    }
  }
}

// One token's queries; without angles copied.
template <class T>
FI_INLINE void put_query(const AppendPagesParams& p, int64_t n, const RopeAngles* angles) {
  const QueryRows& q = p.query;
  for (int64_t h = 0; h < q.num_heads; ++h) {
    const T* x = static_cast<const T*>(q.input) + n * q.input_stride_n + h * q.input_stride_h;
    T* y = static_cast<T*>(q.output) + n * q.output_stride_n + h * q.output_stride_h;
    if (angles) {
      rotate_row(x, y, *angles, p.rope.rotary_dim, p.key.head_dim, p.rope.interleaved);
    } else {
      __builtin_memcpy(y, x, p.key.head_dim * sizeof(T));
    }
  }
}

template <class T>
void append_block(const AppendPagesParams& p, int64_t begin, int64_t end) {
  const int64_t angle_floats = p.rope.cos ? rope_angle_floats(p.rope.rotary_dim) : 0;
  auto* scratch = static_cast<float*>(
      p.rope.cos ? __builtin_malloc(sizeof(float) * (angle_floats + p.key.head_dim)) : nullptr);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t position = p.positions.at(n);
    const PageEntry at = page_entry(p.table, p.batch_indices.at(n), position);
    if (at.page < 0) {
      put_query<T>(p, n, nullptr);
      continue;
    }
    if (p.rope.cos) {
      const RopeAngles angles = rope_angles(p.rope, 0, position, scratch);
      put_query<T>(p, n, &angles);
      append_rotated<T>(p, n, at, angles, scratch + angle_floats);
    } else {
      append_token<T>(p.key, n, at, p.num_kv_heads, p.cache_dtype);
    }
    append_token<T>(p.value, n, at, p.num_kv_heads, p.cache_dtype);
  }
  __builtin_free(scratch);
}

}  // namespace

void append_paged_kv_cache(const AppendPagesParams& p, const Parallel& parallel) {
  const int64_t token_elements =
      (p.query.num_heads + p.num_kv_heads) * p.key.head_dim + p.num_kv_heads * p.value.head_dim;
  dispatch_float(p.dtype, [&](auto t) {
    for_each_row_block(parallel, p.nnz, token_elements,
                       [&](int64_t begin, int64_t end) { append_block<decltype(t)>(p, begin, end); });
  });
}

void get_batch_indices_positions(const BatchPositionsParams& p, const Parallel& parallel) {
  for_each_block(serial_if_small(parallel, p.nnz), p.nnz, kTaskElements, [&](int64_t begin, int64_t end) {
    int64_t b = last_request_from(p, begin);
    for (int64_t i = begin; i < end; ++i) {
      while (b + 1 < p.batch && p.append_indptr.at(b + 1) <= i) ++b;
      const int32_t position = p.batch > 0 ? appended_position(p, b, i) : -1;
      p.positions[i] = position;
      p.batch_indices[i] = position < 0 ? -1 : static_cast<int32_t>(b);
    }
  });
}

void get_seq_lens(const SeqLensParams& p, const Parallel&) {
  for (int64_t b = 0; b < p.batch; ++b) put_seq_len(p, b);
}

void copy_pages(const CopyPagesParams& p, const Parallel& parallel) {
  const int64_t page_bytes = p.caches[0].parts.num_rows * p.caches[0].run_bytes;
  // A task is one page of one cache.
  for_each_task(serial_if_small(parallel, p.num_copies * page_bytes), 2 * p.num_copies, [&](int64_t task) {
    const Pages& pages = p.caches[task % 2];
    const int64_t from = p.src_pages.at(task / 2), to = p.dst_pages.at(task / 2);
    if (from < 0 || from >= p.num_pages || to < 0 || to >= p.num_pages || pages.run_bytes == 0) return;
    for (int64_t row = 0; row < pages.parts.num_rows; ++row) {
      const int64_t offset = pages.parts.offset(row);
      __builtin_memcpy(static_cast<char*>(pages.data) + to * pages.page_stride + offset,
                       static_cast<const char*>(pages.data) + from * pages.page_stride + offset,
                       pages.run_bytes);
    }
  });
}

}  // namespace fi::FI_ISA
