// Runs baseline kernels without torch, for architectures that only an emulator runs here: attention in three
// dtypes (masked decode and prefill, grouped heads, RoPE, an odd head_dim) and RMSNorm, against naive double.
// Prints "ok", or what is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fi/cpu/attention_dtypes.h"
#include "fi/norm.h"

namespace {

double next_random() {  // in [-1, 1), the same on every machine
  static uint64_t state = 42;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(state >> 11) / double(1ull << 52) - 1.0;
}

template <class T>
std::vector<T> random_tensor(int64_t n) {
  std::vector<T> x(n);
  for (T& v : x) v = fi::from_float<T>(float(next_random()));
  return x;
}

void* allocate(void* context, int64_t bytes) {
  auto* blocks = static_cast<std::vector<void*>*>(context);
  blocks->push_back(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  return blocks->back();
}

const fi::Parallel serial = {[](int64_t workers, void (*body)(int64_t, void*), void* context) {
                               for (int64_t w = 0; w < workers; ++w) body(w, context);
                             },
                             2};

template <class T>
double attention_error(int64_t heads, int64_t kv_heads, int64_t qo_len, int64_t kv_len, int64_t dim,
                       bool causal, bool with_mask,
                       void (*kernel)(const fi::AttentionParams&, const fi::Parallel&), fi::DType dtype) {
  auto q = random_tensor<T>(heads * qo_len * dim);
  auto k = random_tensor<T>(kv_heads * kv_len * dim), v = random_tensor<T>(kv_heads * kv_len * dim);
  std::vector<T> out(heads * qo_len * dim);
  std::vector<uint8_t> mask(kv_len, 1);
  for (int64_t j = 0; j < kv_len; ++j) mask[j] = j < kv_len - 5 && j % 7 != 3;

  std::vector<void*> blocks;
  fi::AttentionParams p{};
  p.batch = 1, p.num_qo_heads = heads, p.num_kv_heads = kv_heads, p.qo_len = qo_len, p.kv_len = kv_len;
  p.head_dim_qk = p.head_dim_vo = dim;
  p.dtype = dtype;
  p.query = q.data(), p.q_stride_b = heads * qo_len * dim, p.q_stride_h = qo_len * dim, p.q_stride_n = dim;
  p.key = k.data(), p.k_stride_b = kv_heads * kv_len * dim, p.k_stride_h = kv_len * dim, p.k_stride_n = dim;
  p.value = v.data(), p.v_stride_b = p.k_stride_b, p.v_stride_h = p.k_stride_h, p.v_stride_n = dim;
  p.out = out.data(), p.o_stride_b = p.q_stride_b, p.o_stride_h = p.q_stride_h, p.o_stride_n = dim;
  if (with_mask) p.mask = mask.data(), p.mask_stride_k = 1;
  p.causal = causal;
  p.q_offset = kv_len - qo_len;
  p.scale = 0.3f;
  p.scratch = {allocate, &blocks};
  kernel(p, serial);
  for (void* block : blocks) std::free(block);

  double worst = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t g = h / (heads / kv_heads);
    for (int64_t i = 0; i < qo_len; ++i) {
      std::vector<double> o(dim, 0.0);
      double total = 0;
      for (int64_t j = 0; j < kv_len; ++j) {
        if ((with_mask && !mask[j]) || (causal && j > i + p.q_offset)) continue;
        double dot = 0;
        for (int64_t d = 0; d < dim; ++d)
          dot += double(fi::to_float(q[(h * qo_len + i) * dim + d])) *
                 fi::to_float(k[(g * kv_len + j) * dim + d]);
        const double weight = std::exp(dot * 0.3);
        total += weight;
        for (int64_t d = 0; d < dim; ++d) o[d] += weight * fi::to_float(v[(g * kv_len + j) * dim + d]);
      }
      for (int64_t d = 0; d < dim; ++d)
        worst = std::fmax(
            worst, std::fabs(fi::to_float(out[(h * qo_len + i) * dim + d]) - (total > 0 ? o[d] / total : 0)));
    }
  }
  return worst;
}

template <class T>
int check_attention(const char* name, void (*kernel)(const fi::AttentionParams&, const fi::Parallel&),
                    fi::DType dtype, double limit) {
  const double errors[] = {
      attention_error<T>(8, 2, 1, 600, 64, false, true, kernel, dtype),
      attention_error<T>(4, 2, 40, 90, 17, true, false, kernel, dtype),
      attention_error<T>(2, 1, 130, 130, 80, true, true, kernel, dtype),
  };
  for (double error : errors) {
    if (!(error <= limit)) {
      std::printf("attention_%s: error %g, limit %g\n", name, error, limit);
      return 1;
    }
  }
  return 0;
}

int check_rmsnorm() {
  const int64_t hidden = 97;
  auto x = random_tensor<float>(3 * hidden), w = random_tensor<float>(hidden);
  std::vector<float> y(3 * hidden);
  fi::NormParams p{};
  p.input = x.data(), p.weight = w.data(), p.output = y.data(), p.hidden_size = hidden, p.eps = 1e-6f;
  p.dtype = p.weight_dtype = fi::DType::f32;
  p.input_rows.num_rows = p.output_rows.num_rows = 3;
  p.input_rows.ndim = p.output_rows.ndim = 1;
  p.input_rows.sizes[0] = p.output_rows.sizes[0] = 3;
  p.input_rows.strides[0] = p.output_rows.strides[0] = hidden;
  fi::baseline::rmsnorm(p, serial);
  for (int64_t r = 0; r < 3; ++r) {
    double squares = 0;
    for (int64_t d = 0; d < hidden; ++d) squares += double(x[r * hidden + d]) * x[r * hidden + d];
    for (int64_t d = 0; d < hidden; ++d) {
      const double want = x[r * hidden + d] / std::sqrt(squares / hidden + 1e-6) * w[d];
      if (std::fabs(y[r * hidden + d] - want) > 1e-5) {
        std::printf("rmsnorm: got %g, expected %g\n", y[r * hidden + d], want);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main() {
  int failures = check_rmsnorm();
  failures += check_attention<float>("f32", fi::baseline::attention_f32, fi::DType::f32, 2e-6);
  failures += check_attention<fi::bf16>("bf16", fi::baseline::attention_bf16, fi::DType::bf16, 8e-3);
  failures += check_attention<fi::f16>("f16", fi::baseline::attention_f16, fi::DType::f16, 1e-3);
  if (failures == 0) std::printf("ok\n");
  return failures;
}
