// Rotary embedding over [batch, heads, len, head_dim] by strides, and cos/sin tables in double precision.
#include "fi/rope.h"

#include "fi/cuda/rope_row.h"
#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

// Two cos and sin a pair need more registers than 64.
template <class T, int N, bool interleaved, bool per_member>
__global__ void __launch_bounds__(kMaxThreads, per_member ? 3 : 4)
    rope_kernel(const __grid_constant__ RopeParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t num_tokens = p.batch * p.len, num_heads = p.query.num_heads + p.key.num_heads;
  const int64_t pairs = p.rotary_dim / 2;
  const int64_t first_head = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  const int64_t head_step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z; token < num_tokens;
       token += int64_t{gridDim.x} * blockDim.z) {
    const int64_t b = token / p.len, l = token - b * p.len;
    // Positions are not checked by default: an impossible one takes the nearest row of the tables.
    int64_t angle_row = p.positions ? p.positions.at(b, l) : l;
    angle_row = angle_row < p.num_rows ? angle_row : p.num_rows - 1;
    if (angle_row < 0) angle_row = 0;
    if (p.num_rows == 0) return;
    auto for_each_head = [&](auto f) {
      for (int64_t h = first_head; h < num_heads; h += head_step) {
        const bool is_key = h >= p.query.num_heads;
        const RopeHeads& heads = is_key ? p.key : p.query;
        const int64_t head = is_key ? h - p.query.num_heads : h;
        const int64_t* in = heads.input_strides;
        const int64_t* out = heads.output_strides;
        f(static_cast<const T*>(heads.input) + b * in[0] + head * in[1] + l * in[2],
          static_cast<T*>(heads.output) + b * out[0] + head * out[1] + l * out[2]);
      }
    };
    for (int64_t first = int64_t{threadIdx.x} * N; first < pairs; first += int64_t{blockDim.x} * N) {
      const auto angles = load_rope_angles<N, interleaved, per_member>(
          p.cos, b * p.cos_strides[0] + angle_row * p.cos_strides[1], p.sin,
          b * p.sin_strides[0] + angle_row * p.sin_strides[1], p.angle_dtype, p.rotary_dim, first);
      for_each_head([&](const T* x, T* y) { rotate_pairs<interleaved>(x, y, angles, p.rotary_dim, first); });
    }
    if (p.rotary_dim == p.head_dim) continue;
    for_each_head([&](const T* x, T* y) {
      if (x != y) copy_elements<N>(x, y, p.rotary_dim, p.head_dim);
    });
  }
}

// A thread keeps one pair's frequency and goes over positions: x of the grid is pairs, y positions.
__global__ void __launch_bounds__(kMaxThreads)
    rope_cos_sin_kernel(const __grid_constant__ RopeCosSinParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t pair = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (pair >= p.frequencies.num_pairs) return;
  const double frequency = p.frequencies.at(pair);
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < p.position_rows.num_rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    const double position = static_cast<double>(p.positions.at(p.position_rows.offset(row)));
    double c, s;
    sincos(position * frequency, &s, &c);
    p.cos[row * p.frequencies.num_pairs + pair] = static_cast<float>(c);
    p.sin[row * p.frequencies.num_pairs + pair] = static_cast<float>(s);
  }
}

bool packs_fit_everywhere(const RopeParams& p) {
  bool fit = p.rotary_dim % (2 * 16 / size_of(p.dtype)) == 0 && p.head_dim % (16 / size_of(p.dtype)) == 0;
  for (const RopeHeads* heads : {&p.query, &p.key}) {
    const int64_t *in = heads->input_strides, *out = heads->output_strides;
    fit = fit && (heads->num_heads == 0 || (packs_fit(heads->input, p.dtype, {in[0], in[1], in[2]}) &&
                                            packs_fit(heads->output, p.dtype, {out[0], out[1], out[2]})));
  }
  return fit && packs_fit(p.cos, p.angle_dtype, {p.cos_strides[0], p.cos_strides[1]}) &&
         packs_fit(p.sin, p.angle_dtype, {p.sin_strides[0], p.sin_strides[1]});
}

}  // namespace

void rope(const RopeParams& p, const Gpu& gpu) {
  const int64_t num_tokens = p.batch * p.len, num_heads = p.query.num_heads + p.key.num_heads;
  if (num_tokens == 0 || num_heads == 0 || p.head_dim == 0) return;
  dispatch_pack(p.dtype, packs_fit_everywhere(p), [&](auto t, auto size) {
    constexpr int N = decltype(size)::value;
    const Shape shape = shape_over_heads(gpu, num_tokens, num_heads, p.rotary_dim / 2 / N);
    dispatch_bool(p.interleaved, [&](auto interleaved) {
      dispatch_bool(p.width == p.rotary_dim, [&](auto per_member) {
        launch(gpu, rope_kernel<decltype(t), N, interleaved.value, per_member.value>, shape.grid, shape.block,
               0, /*overlap=*/true, p);
      });
    });
  });
}

void rope_cos_sin(const RopeCosSinParams& p, const Gpu& gpu) {
  const int64_t pairs = p.frequencies.num_pairs, num_rows = p.position_rows.num_rows;
  if (num_rows == 0) return;
  const unsigned x = pairs >= kMaxThreads ? kMaxThreads : power_of_2_at_least(pairs), y = kMaxThreads / x;
  const int64_t columns = ceil_div(pairs, x);
  // No more blocks than the GPU holds at once, so that frequencies (a pow each) are made few times.
  const int64_t blocks_wanted = ceil_div(int64_t{gpu.num_sms} * 8, columns);
  const dim3 grid(static_cast<unsigned>(columns),
                  static_cast<unsigned>(smaller(ceil_div(num_rows, y), smaller(blocks_wanted, kMaxGridY))));
  launch(gpu, rope_cos_sin_kernel, grid, dim3(x, y), 0, /*overlap=*/true, p);
}

}  // namespace fi::cuda
