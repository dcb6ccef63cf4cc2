// Merging of attention states. A state whose log-sum-exp is -inf has weight exactly 0 and its output is not
// read, so that whatever is there (NaN too) does no harm; where all are -inf the result is 0 and -inf.
#include "fi/merge.h"

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {
namespace {

FI_INLINE bool is_empty(float s) { return s == -kInf; }

template <class T>
FI_INLINE void copy_row(T* y, const T* x, int64_t n) {
  if (x != y) __builtin_memmove(y, x, sizeof(T) * n);
}

template <class T>
FI_INLINE void merge_pair(const MergeParams& p, int64_t token, int64_t head) {
  const int64_t n = p.head_dim;
  const float sa = p.a.s[token * p.a.s_strides[0] + head * p.a.s_strides[1]];
  const float sb = p.b.s[token * p.b.s_strides[0] + head * p.b.s_strides[1]];
  const T* va = static_cast<const T*>(p.a.v) + token * p.a.v_strides[0] + head * p.a.v_strides[1];
  const T* vb = static_cast<const T*>(p.b.v) + token * p.b.v_strides[0] + head * p.b.v_strides[1];
  T* y = static_cast<T*>(p.v_out) + token * p.v_out_strides[0] + head * p.v_out_strides[1];
  float& s = p.s_out[token * p.s_out_strides[0] + head * p.s_out_strides[1]];
  if (is_empty(sa) && is_empty(sb)) {
    s = -kInf;
    for_each_vec(n, [&](int64_t i, int64_t count) { store_n(y + i, zero(), count); });
  } else if (is_empty(sb)) {
    s = sa;
    copy_row(y, va, n);
  } else if (is_empty(sa)) {
    s = sb;
    copy_row(y, vb, n);
  } else {
    const float top = sa > sb ? sa : sb;
    const float a = __builtin_exp2f(sa - top), b = __builtin_exp2f(sb - top), total = a + b;
    const float wa = a / total, wb = b / total;
    s = top + __builtin_log2f(total);
    for_each_vec(n, [&](int64_t i, int64_t count) {
      store_n(y + i, fma(load_n(va + i, count), set1(wa), load_n(vb + i, count) * wb), count);
    });
  }
}

template <class T>
void merge_many(const MergeParams& p, int64_t token, int64_t head, float* sum) {
  const int64_t n = p.head_dim;
  const float* s = p.a.s + token * p.a.s_strides[0] + head * p.a.s_strides[1];
  const T* v = static_cast<const T*>(p.a.v) + token * p.a.v_strides[0] + head * p.a.v_strides[1];
  T* y = static_cast<T*>(p.v_out) + token * p.v_out_strides[0] + head * p.v_out_strides[1];
  float top = -kInf;
  for (int64_t j = 0; j < p.num_states; ++j) {
    const float x = s[j * p.s_state_stride];
    top = x > top || x != x ? x : top;  // a NaN stays
  }
  float total = 0.0f;
  for_each_vec(n, [&](int64_t i, int64_t count) { store_n(sum + i, zero(), count); });
  for (int64_t j = 0; j < p.num_states; ++j) {
    const float x = s[j * p.s_state_stride];
    if (is_empty(x)) continue;
    const float weight = __builtin_exp2f(x - top);
    total += weight;
    const T* row = v + j * p.v_state_stride;
    for_each_vec(n, [&](int64_t i, int64_t count) {
      store_n(sum + i, fma(load_n(row + i, count), set1(weight), load_n(sum + i, count)), count);
    });
  }
  p.s_out[token * p.s_out_strides[0] + head * p.s_out_strides[1]] =
      is_empty(top) ? -kInf : top + __builtin_log2f(total);
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  for_each_vec(n, [&](int64_t i, int64_t count) { store_n(y + i, load_n(sum + i, count) * scale, count); });
}

}  // namespace

void merge_state(const MergeParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_row_block(parallel, p.seq_len * p.num_heads, 2 * p.head_dim, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = row / p.num_heads;
        if (p.mask == nullptr || p.mask[token * p.mask_stride]) merge_pair<T>(p, token, row % p.num_heads);
      }
    });
  });
}

void merge_states(const MergeParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_row_block(parallel, p.seq_len * p.num_heads, p.head_dim * (p.num_states + 1),
                       [&](int64_t begin, int64_t end) {
                         auto* sum = static_cast<float*>(__builtin_malloc(sizeof(float) * (p.head_dim + 1)));
                         for (int64_t row = begin; row < end; ++row)
                           merge_many<T>(p, row / p.num_heads, row % p.num_heads, sum);
                         __builtin_free(sum);
                       });
  });
}

}  // namespace fi::FI_ISA
