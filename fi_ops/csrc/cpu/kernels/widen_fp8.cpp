// 8-bit floats widened, by a table of all 256 values.
#include "fi/widen_fp8.h"

#include "fi/dispatch.h"

namespace fi::FI_ISA {

void widen_fp8(const WidenFp8Params& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    T values[256];
    for (int x = 0; x < 256; ++x) {
      const auto bits = static_cast<uint8_t>(x);
      values[x] = from_float<T>(p.format == Fp8::e4m3 ? from_e4m3(bits) : from_e5m2(bits));
    }
    const int64_t rows_per_task = p.dim > 0 ? 16384 / p.dim + 1 : 1;
    for_each_block(parallel, p.rows.num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* x = static_cast<const uint8_t*>(p.input) + p.rows.offset(row);
        T* y = static_cast<T*>(p.output) + row * p.dim;
        for (int64_t i = 0; i < p.dim; ++i) y[i] = values[x[i]];
      }
    });
  });
}

}  // namespace fi::FI_ISA
