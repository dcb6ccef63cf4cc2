// Paged KV caches: appending tokens (keys and queries rotated on the way where a table is given), copying
// pages, the index tensors of a batch. Tables are not checked by default: what they place nowhere is left
// out.
#include "fi/pages.h"

#include "fi/cuda/rope_row.h"
#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

// ---- append ----

template <int N>
FI_DEVICE_INLINE void store_fp8_pack(uint8_t* p, const float (&x)[N], Fp8 format) {
  uint32_t words[(N + 3) / 4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i)
    words[i / 4] |= uint32_t{format == Fp8::e4m3 ? to_e4m3(x[i]) : to_e5m2(x[i])} << (8 * (i % 4));
  if constexpr (N == 8) {
    *reinterpret_cast<uint2*>(p) = uint2{words[0], words[1]};
  } else if constexpr (N == 4) {
    *reinterpret_cast<uint32_t*>(p) = words[0];
  } else {
    *p = static_cast<uint8_t>(words[0]);
  }
}

// Elements begin .. end of a row into a cache, bit for bit or rounded to fp8, by the block's threads along x.
template <int N, class T>
FI_DEVICE_INLINE void store_elements(const T* x, void* cache, int64_t offset, int64_t begin, int64_t end,
                                     Fp8 format) {
  if (format == Fp8::none) {
    copy_elements<N>(x, static_cast<T*>(cache) + offset, begin, end);
    return;
  }
  for (int64_t j = begin + int64_t{threadIdx.x} * N; j < end; j += int64_t{blockDim.x} * N) {
    float values[N];
    load_pack(values, x + j);
    store_fp8_pack(static_cast<uint8_t*>(cache) + offset + j, values, format);
  }
}

// The rotated elements of a row, by the block's threads along x, to put(i, values).
template <int N, bool interleaved, class T, class Put>
FI_DEVICE_INLINE void rotate_elements(const T* x, const RopeTable& rope, int64_t angle_row, const Put& put) {
  for (int64_t first = int64_t{threadIdx.x} * N; first < rope.rotary_dim / 2;
       first += int64_t{blockDim.x} * N) {
    const auto angles = load_rope_angles<N, interleaved, /*per_member=*/false>(
        rope.cos, angle_row * rope.cos_stride_row, rope.sin, angle_row * rope.sin_stride_row, rope.dtype,
        rope.rotary_dim, first);
    rotate_pairs_to<interleaved>(x, angles, rope.rotary_dim, first, put);
  }
}

// Heads are numbered queries, keys, values.
template <class T, int N, bool interleaved>
__global__ void __launch_bounds__(kMaxThreads, 4)
    append_pages_kernel(const __grid_constant__ AppendPagesParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t num_queries = p.query.num_heads, num_heads = num_queries + 2 * p.num_kv_heads;
  for (int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z; token < p.nnz;
       token += int64_t{gridDim.x} * blockDim.z) {
    const int64_t position = p.positions.at(token);
    const PageEntry at = page_entry(p.table, p.batch_indices.at(token), position);
    const bool rotate = p.rope.cos && at.page >= 0 && p.rope_len > 0;
    const int64_t angle_row = smaller(position, p.rope_len - 1), rotated = rotate ? p.rope.rotary_dim : 0;
    for (int64_t h = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; h < num_heads;
         h += int64_t{gridDim.y} * blockDim.y) {
      if (h < num_queries) {
        const QueryRows& q = p.query;
        const T* x = static_cast<const T*>(q.input) + token * q.input_stride_n + h * q.input_stride_h;
        T* y = static_cast<T*>(q.output) + token * q.output_stride_n + h * q.output_stride_h;
        if (rotate)
          rotate_elements<N, interleaved>(
              x, p.rope, angle_row, [&](int64_t i, const float (&values)[N]) { store_pack(y + i, values); });
        copy_elements<N>(x, y, rotated, p.key.head_dim);
        continue;
      }
      if (at.page < 0) break;
      const bool is_key = h < num_queries + p.num_kv_heads;
      const PagedRows& rows = is_key ? p.key : p.value;
      const int64_t head = h - num_queries - (is_key ? 0 : p.num_kv_heads);
      const T* x = static_cast<const T*>(rows.input) + rows.input_offset(token, head);
      const int64_t to = rows.cache_offset(at, head);
      if (is_key && rotate)
        rotate_elements<N, interleaved>(x, p.rope, angle_row, [&](int64_t i, const float (&values)[N]) {
          if (p.cache_dtype == Fp8::none) {
            store_pack(static_cast<T*>(rows.cache) + to + i, values);
          } else {
            store_fp8_pack(static_cast<uint8_t*>(rows.cache) + to + i, values, p.cache_dtype);
          }
        });
      store_elements<N>(x, rows.cache, to, is_key ? rotated : 0, rows.head_dim, p.cache_dtype);
    }
  }
}

// Many tokens as they are. What a thread reads does not depend on the table: it has a pack of each of several
// tokens in flight while the block's first threads look up where these go.
constexpr int kTokensInFlight = 4;

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    append_rows_kernel(const __grid_constant__ AppendPagesParams p) {
  constexpr int N = kPackSize<T>;
  __shared__ PageEntry places[kTokensInFlight];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t first = int64_t{blockIdx.x} * kTokensInFlight, last = p.nnz - 1;
  const int packs = static_cast<int>(p.key.head_dim) / N;  // of a head
  const int item = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), row = item / packs;
  const bool is_key = row < p.num_kv_heads, inside = row < 2 * p.num_kv_heads;
  const int64_t head = is_key ? row : row - p.num_kv_heads, column = int64_t{item - row * packs} * N;
  const PagedRows& rows = is_key ? p.key : p.value;
  uint4 values[kTokensInFlight];
#pragma unroll
  for (int k = 0; k < kTokensInFlight; ++k)
    if (inside)
      values[k] = load_16(static_cast<const T*>(rows.input) +
                          rows.input_offset(smaller(first + k, last), head) + column);
  if (threadIdx.x < kTokensInFlight) {
    const int64_t token = first + threadIdx.x;
    places[threadIdx.x] =
        token <= last ? page_entry(p.table, p.batch_indices.at(token), p.positions.at(token)) : PageEntry{};
  }
  __syncthreads();
  if (!inside) return;
#pragma unroll
  for (int k = 0; k < kTokensInFlight; ++k) {
    const PageEntry at = places[k];
    if (at.page < 0) continue;
    const int64_t to = rows.cache_offset(at, head) + column;
    if (p.cache_dtype == Fp8::none) {
      store_16(static_cast<T*>(rows.cache) + to, values[k]);
    } else {
      float wide[N];
      unpack_16<T>(wide, values[k]);
      store_fp8_pack(static_cast<uint8_t*>(rows.cache) + to, wide, p.cache_dtype);
    }
  }
}

bool packs_fit_everywhere(const AppendPagesParams& p) {
  const int64_t pack = 16 / size_of(p.dtype);  // elements
  bool fit = true;
  for (const PagedRows* rows : {&p.key, &p.value}) {
    fit = fit && rows->head_dim % pack == 0 &&
          packs_fit(rows->input, p.dtype, {rows->input_stride_n, rows->input_stride_h});
    if (p.cache_dtype == Fp8::none) {
      fit = fit && packs_fit(rows->cache, p.dtype,
                             {rows->cache_stride_page, rows->cache_stride_n, rows->cache_stride_h});
    } else {
      fit = fit && reinterpret_cast<uintptr_t>(rows->cache) % pack == 0;
      for (const int64_t stride : {rows->cache_stride_page, rows->cache_stride_n, rows->cache_stride_h})
        fit = fit && stride % pack == 0;
    }
  }
  const QueryRows& q = p.query;
  const RopeTable& rope = p.rope;
  return fit &&
         (q.num_heads == 0 || (packs_fit(q.input, p.dtype, {q.input_stride_n, q.input_stride_h}) &&
                               packs_fit(q.output, p.dtype, {q.output_stride_n, q.output_stride_h}))) &&
         (rope.cos == nullptr ||
          (rope.rotary_dim % (2 * pack) == 0 && packs_fit(rope.cos, rope.dtype, {rope.cos_stride_row}) &&
           packs_fit(rope.sin, rope.dtype, {rope.sin_stride_row})));
}

// ---- index tensors ----

__global__ void __launch_bounds__(kMaxThreads)
    batch_positions_kernel(const __grid_constant__ BatchPositionsParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.nnz;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t b = last_request_from(p, i);
    const int32_t position = p.batch > 0 ? appended_position(p, b, i) : -1;
    p.positions[i] = position;
    p.batch_indices[i] = position < 0 ? -1 : static_cast<int32_t>(b);
  }
}

__global__ void __launch_bounds__(kMaxThreads) seq_lens_kernel(const __grid_constant__ SeqLensParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int64_t b = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; b < p.batch;
       b += int64_t{gridDim.x} * blockDim.x)
    put_seq_len(p, b);
}

// ---- copies of pages ----

constexpr int kUnitsInFlight = 4;  // a thread's loads before its first store

// Unit: what one instruction moves, uint4 to uint8_t. A block takes a piece of one page: copies along x of
// the grid, pieces along y, caches along z.
template <class Unit>
__global__ void __launch_bounds__(kMaxThreads) copy_pages_kernel(const __grid_constant__ CopyPagesParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const Pages& pages = p.caches[blockIdx.z];
  const int64_t run_units = pages.run_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t units = pages.parts.num_rows * run_units, step = int64_t{gridDim.y} * blockDim.x;
  auto offset = [&](int64_t unit) {
    if (pages.parts.num_rows == 1) return unit * static_cast<int64_t>(sizeof(Unit));
    const int64_t row = unit / run_units;
    return pages.parts.offset(row) + (unit - row * run_units) * static_cast<int64_t>(sizeof(Unit));
  };
  for (int64_t i = blockIdx.x; i < p.num_copies; i += gridDim.x) {
    const int64_t from = p.src_pages.at(i), to = p.dst_pages.at(i);
    if (from < 0 || from >= p.num_pages || to < 0 || to >= p.num_pages) continue;
    const char* source = static_cast<const char*>(pages.data) + from * pages.page_stride;
    char* target = static_cast<char*>(pages.data) + to * pages.page_stride;
    for (int64_t first = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; first < units;
         first += kUnitsInFlight * step) {
      Unit values[kUnitsInFlight];
#pragma unroll
      for (int k = 0; k < kUnitsInFlight; ++k)
        if (first + k * step < units)
          values[k] = *reinterpret_cast<const Unit*>(source + offset(first + k * step));
#pragma unroll
      for (int k = 0; k < kUnitsInFlight; ++k)
        if (first + k * step < units) *reinterpret_cast<Unit*>(target + offset(first + k * step)) = values[k];
    }
  }
}

// Whether both caches can be moved by units of so many bytes.
bool units_fit(const CopyPagesParams& p, int64_t bytes) {
  bool fit = true;
  for (const Pages& pages : p.caches) {
    fit = fit && reinterpret_cast<uintptr_t>(pages.data) % bytes == 0 && pages.page_stride % bytes == 0 &&
          pages.run_bytes % bytes == 0;
    for (int d = 0; d < pages.parts.ndim; ++d) fit = fit && pages.parts.strides[d] % bytes == 0;
  }
  return fit;
}

template <class Unit>
void copy_by(const CopyPagesParams& p, const Gpu& gpu) {
  int64_t units = 1;
  for (const Pages& pages : p.caches) {
    const int64_t mine = pages.parts.num_rows * pages.run_bytes / static_cast<int64_t>(sizeof(Unit));
    units = mine > units ? mine : units;
  }
  const int64_t pieces = ceil_div(units, kMaxThreads * kUnitsInFlight);
  const dim3 grid(static_cast<unsigned>(smaller(p.num_copies, kMaxGridX)),
                  static_cast<unsigned>(smaller(pieces, kMaxGridY)), 2);
  launch(gpu, copy_pages_kernel<Unit>, grid, dim3(kMaxThreads), 0, /*overlap=*/true, p);
}

unsigned blocks_for(const Gpu& gpu, int64_t items) {
  return static_cast<unsigned>(smaller(ceil_div(items, kMaxThreads), int64_t{gpu.num_sms} * 8));
}

}  // namespace

void append_paged_kv_cache(const AppendPagesParams& p, const Gpu& gpu) {
  const int64_t num_heads = p.query.num_heads + 2 * p.num_kv_heads;
  if (p.nnz == 0 || num_heads == 0) return;
  const bool many = p.nnz >= int64_t{8} * gpu.num_sms && p.nnz / kTokensInFlight < kMaxGridX;
  const bool rows_alone =
      p.query.num_heads == 0 && p.rope.cos == nullptr && p.key.head_dim == p.value.head_dim;
  dispatch_pack(p.dtype, packs_fit_everywhere(p), [&](auto t, auto size) {
    constexpr int N = decltype(size)::value;
    if (N > 1 && many && rows_alone) {
      const int64_t items = num_heads * (p.key.head_dim / N),
                    threads = smaller(kMaxThreads, (items + 31) / 32 * 32);
      const dim3 grid(static_cast<unsigned>(ceil_div(p.nnz, kTokensInFlight)),
                      static_cast<unsigned>(ceil_div(items, threads)));
      return launch(gpu, append_rows_kernel<decltype(t)>, grid, dim3(static_cast<unsigned>(threads)), 0,
                    /*overlap=*/true, p);
    }
    const int64_t elements = p.key.head_dim > p.value.head_dim ? p.key.head_dim : p.value.head_dim;
    // With RoPE a thread takes two packs of a row, else one.
    const Shape shape = shape_over_heads(gpu, p.nnz, num_heads, ceil_div(elements, p.rope.cos ? 2 * N : N));
    dispatch_bool(p.rope.interleaved, [&](auto interleaved) {
      launch(gpu, append_pages_kernel<decltype(t), N, interleaved.value>, shape.grid, shape.block, 0,
             /*overlap=*/true, p);
    });
  });
}

void get_batch_indices_positions(const BatchPositionsParams& p, const Gpu& gpu) {
  if (p.nnz == 0) return;
  launch(gpu, batch_positions_kernel, dim3(blocks_for(gpu, p.nnz)), dim3(kMaxThreads), 0, /*overlap=*/true,
         p);
}

void get_seq_lens(const SeqLensParams& p, const Gpu& gpu) {
  if (p.batch == 0) return;
  launch(gpu, seq_lens_kernel, dim3(blocks_for(gpu, p.batch)), dim3(kMaxThreads), 0, /*overlap=*/true, p);
}

void copy_pages(const CopyPagesParams& p, const Gpu& gpu) {
  if (p.num_copies == 0) return;
  if (units_fit(p, 16)) {
    copy_by<uint4>(p, gpu);
  } else if (units_fit(p, 4)) {
    copy_by<uint32_t>(p, gpu);
  } else if (units_fit(p, 2)) {
    copy_by<uint16_t>(p, gpu);
  } else {
    copy_by<uint8_t>(p, gpu);
  }
}

}  // namespace fi::cuda
