// 8-bit floats widened.
#include "fi/widen_fp8.h"

#include "fi/cpu/fp8_rows.h"

namespace fi::FI_ISA {

void widen_fp8(const WidenFp8Params& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t rows_per_task = p.dim > 0 ? 16384 / p.dim + 1 : 1;
    for_each_block(parallel, p.rows.num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* output = static_cast<T*>(p.output) + row * p.dim;
        convert_row(output, static_cast<const uint8_t*>(p.input) + p.rows.offset(row), p.dim, p.format);
        if (!p.scale) continue;
        const float scale = p.scale_of_row(row);
        for (int64_t i = 0; i < p.dim; ++i) output[i] = from_float<T>(to_float(output[i]) * scale);
      }
    });
  });
}

}  // namespace fi::FI_ISA
