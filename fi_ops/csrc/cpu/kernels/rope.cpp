// Rotary embedding over [batch, heads, len, head_dim] by strides, and cos/sin tables in double precision.
#include "fi/rope.h"

#include "fi/cpu/rope_row.h"

namespace fi::FI_ISA {
namespace {

// Tokens whose angles are kept at hand while a task goes over its heads: few enough that they stay in L1
// beside the rows.
constexpr int64_t kKeptTokens = 16;
// Tasks that are enough for any machine to share evenly.
constexpr int64_t kManyTasks = 64;

FI_INLINE int64_t at_least_1(int64_t x) { return x < 1 ? 1 : x; }
FI_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

FI_INLINE RopeAngles token_angles(const RopeParams& p, int64_t b, int64_t l, float* scratch) {
  const int64_t row = p.positions ? p.positions.at(b, l) : l;
  const int64_t size = size_of(p.angle_dtype);
  const auto* cos = static_cast<const char*>(p.cos) + size * (b * p.cos_strides[0] + row * p.cos_strides[1]);
  const auto* sin = static_cast<const char*>(p.sin) + size * (b * p.sin_strides[0] + row * p.sin_strides[1]);
  return load_rope_angles(cos, sin, p.angle_dtype, p.width, p.rotary_dim, p.interleaved, scratch);
}

// Rows `head` to `heads_end` of one token; heads are numbered queries first, then keys.
template <class T>
FI_INLINE void rotate_heads(const RopeParams& p, const RopeHeads& heads, int64_t b, int64_t l, int64_t head,
                            int64_t heads_end, const RopeAngles& angles) {
  const T* x = static_cast<const T*>(heads.input) + b * heads.input_strides[0] + l * heads.input_strides[2];
  T* y = static_cast<T*>(heads.output) + b * heads.output_strides[0] + l * heads.output_strides[2];
  for (int64_t h = head; h < heads_end; ++h)
    rotate_row(x + h * heads.input_strides[1], y + h * heads.output_strides[1], angles, p.rotary_dim,
               p.head_dim, p.interleaved);
}

struct Token {
  int64_t b, l;
  RopeAngles angles;
};

// A block of tokens and heads. Where a head's tokens are neighbours in memory, a few tokens' angles are
// loaded and the inner loop goes over them; else it goes over the heads.
template <class T>
void rope_task(const RopeParams& p, bool tokens_inner, int64_t token, int64_t tokens_end, int64_t head,
               int64_t heads_end) {
  const int64_t angle_floats = rope_angle_floats(p.rotary_dim), num_queries = p.query.num_heads;
  const int64_t kept = tokens_inner ? kKeptTokens : 1;
  auto* scratch = static_cast<float*>(__builtin_malloc(sizeof(float) * at_least_1(kept * angle_floats)));
  const int64_t queries_end = smaller(heads_end, num_queries);
  const int64_t keys_begin = head > num_queries ? head - num_queries : 0, keys_end = heads_end - num_queries;
  while (token < tokens_end) {
    Token tokens[kKeptTokens];
    const int64_t n = smaller(kept, tokens_end - token);
    for (int64_t i = 0; i < n; ++i, ++token) {
      const int64_t b = token / p.len, l = token % p.len;
      tokens[i] = {b, l, token_angles(p, b, l, scratch + i * angle_floats)};
    }
    if (tokens_inner) {
      for (int64_t h = head; h < queries_end; ++h)
        for (int64_t i = 0; i < n; ++i)
          rotate_heads<T>(p, p.query, tokens[i].b, tokens[i].l, h, h + 1, tokens[i].angles);
      for (int64_t h = keys_begin; h < keys_end; ++h)
        for (int64_t i = 0; i < n; ++i)
          rotate_heads<T>(p, p.key, tokens[i].b, tokens[i].l, h, h + 1, tokens[i].angles);
    } else {
      rotate_heads<T>(p, p.query, tokens[0].b, tokens[0].l, head, queries_end, tokens[0].angles);
      rotate_heads<T>(p, p.key, tokens[0].b, tokens[0].l, keys_begin, keys_end, tokens[0].angles);
    }
  }
  __builtin_free(scratch);
}

// How [batch x len] tokens and all heads are split into tasks. Follows from shapes and strides alone.
struct Split {
  int64_t tokens, heads;  // of a task
  bool tokens_inner;
};

FI_INLINE Split split_of(const RopeParams& p) {
  const int64_t num_tokens = p.batch * p.len, num_heads = p.query.num_heads + p.key.num_heads;
  const int64_t rows = at_least_1(kTaskElements / p.head_dim);  // of a task, at the least
  if (p.len == 1 || p.query.input_strides[1] <= p.query.input_strides[2])
    return {at_least_1(rows / num_heads), num_heads, false};
  // Heads are split too where there are not many tokens.
  const int64_t tokens = smaller(num_tokens, kKeptTokens * at_least_1(rows / (num_heads * kKeptTokens)));
  const int64_t token_tasks = (num_tokens + tokens - 1) / tokens;
  const int64_t for_work = rows / tokens, for_sharing = num_heads * token_tasks / kManyTasks;
  return {tokens, smaller(num_heads, at_least_1(for_work > for_sharing ? for_work : for_sharing)), true};
}

// ---- cos and sin in double precision ----

typedef double VecD __attribute__((vector_size(4 * kLanes)));
typedef int64_t VecL __attribute__((vector_size(4 * kLanes)));
typedef float VecHalf __attribute__((vector_size(2 * kLanes)));
constexpr int kLanesD = kLanes / 2;

// cos and sin of |x| < 2^31, absolute error below 1e-11 before they are rounded to float.
FI_INLINE void cos_sin(VecD x, VecD& cos, VecD& sin) {
  // x = n pi/2 + r, |r| <= pi/4. pi/2 in parts of 22, 22 and 53 bits: n has 31 bits, so the first products
  // are exact.
  const double magic = 0x1.8p52;
  const VecD shifted = x * 0x1.45f306dc9c883p-1 + magic;
  const VecD n = shifted - magic;
  VecD r = x - n * 0x1.921fb8p0;
  r = r - n * -0x1.5dde98p-23;
  r = r - n * 0x1.8469898cc517p-48;
  // The magic number's low bits, and so the quadrant, sit in the low bits of the sum.
  const VecL quadrant = (VecL)shifted;
  const VecD r2 = r * r;
  VecD s = VecD{} - 1.0 / 39916800;
  s = s * r2 + 1.0 / 362880;
  s = s * r2 - 1.0 / 5040;
  s = s * r2 + 1.0 / 120;
  s = s * r2 - 1.0 / 6;
  s = s * r2 * r + r;
  VecD c = VecD{} + 1.0 / 479001600;
  c = c * r2 - 1.0 / 3628800;
  c = c * r2 + 1.0 / 40320;
  c = c * r2 - 1.0 / 720;
  c = c * r2 + 1.0 / 24;
  c = c * r2 - 0.5;
  c = c * r2 + 1.0;
  const VecL swap = -(quadrant & 1);
  const VecL negate_sin = (quadrant & 2) << 62, negate_cos = ((quadrant + 1) & 2) << 62;
  sin = (VecD)((VecL)(swap ? c : s) ^ negate_sin);
  cos = (VecD)((VecL)(swap ? s : c) ^ negate_cos);
}

FI_INLINE void cos_sin_row(double position, const double* frequencies, int64_t n, float* cos, float* sin) {
  VecD angle{}, c, s;
  int64_t i = 0;
  for (; i + kLanesD <= n; i += kLanesD) {
    __builtin_memcpy(&angle, frequencies + i, sizeof(angle));
    cos_sin(angle * position, c, s);
    const VecHalf cos_out = __builtin_convertvector(c, VecHalf),
                  sin_out = __builtin_convertvector(s, VecHalf);
    __builtin_memcpy(cos + i, &cos_out, sizeof(cos_out));
    __builtin_memcpy(sin + i, &sin_out, sizeof(sin_out));
  }
  if (i == n) return;
  for (int lane = 0; lane < kLanesD; ++lane) angle[lane] = i + lane < n ? frequencies[i + lane] : 0.0;
  cos_sin(angle * position, c, s);
  for (int lane = 0; lane < n - i; ++lane) {
    cos[i + lane] = float(c[lane]);
    sin[i + lane] = float(s[lane]);
  }
}

}  // namespace

void rope(const RopeParams& p, const Parallel& parallel) {
  const int64_t num_tokens = p.batch * p.len, num_heads = p.query.num_heads + p.key.num_heads;
  if (num_tokens == 0 || num_heads == 0 || p.head_dim == 0) return;
  const Split split = split_of(p);
  const int64_t head_tasks = (num_heads + split.heads - 1) / split.heads;
  const int64_t token_tasks = (num_tokens + split.tokens - 1) / split.tokens;
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_task(serial_if_small(parallel, num_tokens * num_heads * p.head_dim), token_tasks * head_tasks,
                  [&](int64_t task) {
                    const int64_t token = task / head_tasks * split.tokens,
                                  head = task % head_tasks * split.heads;
                    rope_task<T>(p, split.tokens_inner, token, smaller(token + split.tokens, num_tokens),
                                 head, smaller(head + split.heads, num_heads));
                  });
  });
}

void rope_cos_sin(const RopeCosSinParams& p, const Parallel& parallel) {
  const int64_t n = p.frequencies.num_pairs;
  auto* frequencies = static_cast<double*>(__builtin_malloc(sizeof(double) * n));
  for (int64_t i = 0; i < n; ++i) frequencies[i] = p.frequencies.at(i);
  for_each_row_block(parallel, p.position_rows.num_rows, 4 * n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      cos_sin_row(double(p.positions.at(p.position_rows.offset(row))), frequencies, n, p.cos + row * n,
                  p.sin + row * n);
  });
  __builtin_free(frequencies);
}

}  // namespace fi::FI_ISA
