// Matrix products of a warpgroup, which run while its threads go on.
//
// A warp's part, 16 rows, is computed when the last of its lanes has asked for it, from what the operands are
// then, and is delivered at the wait. Meanwhile the accumulators are poison. What was written to an operand
// or an accumulator before the wait is an error.
#pragma once

#include <cstdint>

namespace fi::emulation {

enum class Element { bf16, f16, e4m3, e5m2 };

struct ProductForm {
  int columns;
  Element a, b;
  bool a_in_registers, b_mn_major;  // all else is K-major
  bool operator==(const ProductForm&) const = default;
};

// d (columns / 2 values of each thread) += a * b, 32 bytes of k; d = a * b where `accumulate` is false. `a`
// is either four registers or a descriptor, as is `b` (fi/cuda/sm90/operand.h).
struct ProductOperands {
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
};
void start_product(const ProductForm& form, const ProductOperands& operands);

// wgmma.fence, wgmma.commit_group and wgmma.wait_group
void fence_products();
void commit_products();
void wait_for_products(int pending);

}  // namespace fi::emulation
