// Matrix products of a warpgroup in the emulator: see emulation/products.h.
#include "emulation/products.h"

#include <algorithm>
#include <cstring>
#include <deque>

#include "emulation/block.h"
#include "fi/fp8.h"

#pragma GCC optimize("O3")

namespace fi::emulation {
namespace {

constexpr int kLanes = 32, kRows = 16, kRowBytes = 32;  // of a warp's operand a; bytes of k in all operands
constexpr int kMostColumns = 256, kMostK = 32;
constexpr uint32_t kPoison = 0xffffffff;

int bytes_of(Element e) { return e == Element::bf16 || e == Element::f16 ? 2 : 1; }
int k_of(const ProductForm& form) { return kRowBytes / bytes_of(form.b); }

// ---- elements ----

template <class Bits, class F>
const float* table_of(const F& value) {
  static const std::vector<float> table = [&] {
    std::vector<float> values(size_t{1} << (8 * sizeof(Bits)));
    for (size_t i = 0; i < values.size(); ++i) values[i] = value(Bits(i));
    return values;
  }();
  return table.data();
}

template <class Bits>
void decode(float* to, const unsigned char* from, int count, const float* table) {
  for (int i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, from + i * sizeof(Bits), sizeof(Bits));
    to[i] = table[bits];
  }
}

void decode(float* to, const unsigned char* from, int count, Element e) {
  switch (e) {
    case Element::bf16:
      for (int i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        to[i] = bits_float(uint32_t{bits} << 16);
      }
      return;
    case Element::f16:
      return decode<uint16_t>(to, from, count,
                              table_of<uint16_t>([](uint16_t x) { return to_float(f16{x}); }));
    case Element::e4m3:
      return decode<uint8_t>(to, from, count, table_of<uint8_t>([](uint8_t x) { return from_e4m3(x); }));
    case Element::e5m2:
      return decode<uint8_t>(to, from, count, table_of<uint8_t>([](uint8_t x) { return from_e5m2(x); }));
  }
}

// ---- operands in shared memory ----

// A descriptor in parts, in bytes.
struct Descriptor {
  uint32_t start;  // from the beginning of dynamic shared memory
  uint32_t leading, stride;
};

Descriptor read_descriptor(uint64_t bits) {
  constexpr uint64_t kField = 0x3fff, kSmemBytes = 1 << 18, kSwizzle128 = 1;
  const auto field = [&](int shift) { return uint32_t(bits >> shift & kField) << 4; };
  if (bits >> 62 != kSwizzle128 || (bits >> 49 & 7) != 0)
    fail("wgmma: an operand that is not swizzled by 128 bytes from an aligned place");
  const auto base = uint32_t(reinterpret_cast<uintptr_t>(dynamic_smem()));
  return {uint32_t((field(0) - base) % kSmemBytes), field(16), field(32)};
}

// 16 bytes, with the swizzle, of shared memory as threads see it or as products do.
void gather_chunk(unsigned char* to, const unsigned char* smem, uint32_t offset) {
  if (offset + 16 > dynamic_smem_bytes()) fail("wgmma: an operand outside of shared memory");
  std::memcpy(to, smem + (offset ^ (offset >> 7 & 7) << 4), 16);
}

// `count` rows of kRowBytes, from row `first` on.
void gather_k_major(unsigned char* to, const unsigned char* smem, const Descriptor& d, int first, int count) {
  for (int row = first; row < first + count; ++row)
    for (uint32_t done = 0; done < kRowBytes; done += 16, to += 16)
      gather_chunk(to, smem, d.start + row / 8 * d.stride + row % 8 * 128 + done);
}

// 16 rows of `columns` elements of two bytes.
void gather_mn_major(unsigned char* to, const unsigned char* smem, const Descriptor& d, int columns) {
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < columns; column += 8, to += 16)
      gather_chunk(to, smem,
                   d.start + k / 8 * d.stride + k % 8 * 128 + column / 64 * d.leading + column % 64 * 2);
}

void check_fenced(const void* seen_by_threads, const void* seen_by_products, size_t bytes) {
  if (std::memcmp(seen_by_threads, seen_by_products, bytes) != 0)
    fail("wgmma: no fence_for_products since threads wrote an operand");
}

// ---- operand b, the same for the warps of a block: its bytes, and as k rows of floats ----

struct OperandB {
  ProductForm form{};
  std::vector<unsigned char> bytes;
  std::vector<float> values;
};

std::vector<unsigned char> gather_b(const ProductForm& form, uint64_t descriptor, const unsigned char* smem) {
  std::vector<unsigned char> bytes(size_t(form.columns) * kRowBytes);
  const Descriptor d = read_descriptor(descriptor);
  form.b_mn_major ? gather_mn_major(bytes.data(), smem, d, form.columns)
                  : gather_k_major(bytes.data(), smem, d, 0, form.columns);
  return bytes;
}

std::shared_ptr<const OperandB> read_b(const ProductForm& form, uint64_t descriptor) {
  static std::shared_ptr<const OperandB> known[256];  // by where they lie
  auto& place = known[(descriptor ^ descriptor >> 8) % 256];
  std::vector<unsigned char> bytes = gather_b(form, descriptor, smem_of_products());
  check_fenced(gather_b(form, descriptor, dynamic_smem()).data(), bytes.data(), bytes.size());
  if (place && place->form == form && place->bytes == bytes) return place;
  auto b = std::make_shared<OperandB>();
  b->form = form;
  b->bytes = std::move(bytes);
  b->values.resize(size_t(k_of(form)) * form.columns);
  if (form.b_mn_major) {
    decode(b->values.data(), b->bytes.data(), int(b->values.size()), form.b);
  } else {
    const int k = k_of(form);
    float row[kMostK];
    for (int column = 0; column < form.columns; ++column) {
      decode(row, b->bytes.data() + column * kRowBytes, k, form.b);
      for (int i = 0; i < k; ++i) b->values[size_t(i) * form.columns + column] = row[i];
    }
  }
  return place = b;
}

// c [kRows, columns] += a [kRows, k] * b [k, columns]
__attribute__((target_clones("arch=haswell", "default"))) void multiply(float* __restrict c,
                                                                        const float* __restrict a,
                                                                        const float* __restrict b, int k,
                                                                        int columns) {
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < k; i += 4) {
      const float x0 = a[row * k + i], x1 = a[row * k + i + 1], x2 = a[row * k + i + 2],
                  x3 = a[row * k + i + 3];
      const float *b0 = b + i * columns, *b1 = b0 + columns, *b2 = b1 + columns, *b3 = b2 + columns;
      float* sums = c + row * columns;
      for (int j = 0; j < columns; ++j) sums[j] += x0 * b0[j] + x1 * b1[j] + x2 * b2[j] + x3 * b3[j];
    }
}

}  // namespace

// ---- what a warp is at ----

// The accumulators of one or more products that follow each other: kRows rows, and where the lanes have them.
struct Accumulators {
  int columns;
  float* d[kLanes] = {};
  std::vector<float> sums;
  size_t last_product = 0;
};

struct Product {
  ProductForm form;
  ProductOperands operands;  // of the first lane
  int lanes = 0;             // that have asked for it
  const uint32_t* a_at[kLanes];
  std::shared_ptr<Accumulators> accumulators;
  unsigned char a[kRows * kRowBytes];
  std::shared_ptr<const OperandB> b;
};

struct WarpProducts {
  std::deque<Product> running;
  size_t finished = 0;  // products that are no longer in `running`
  std::vector<std::shared_ptr<Accumulators>> accumulators;

  struct Lane {
    size_t started = 0;          // products
    std::vector<size_t> groups;  // that are not waited for: how many products had started at their end
    bool fenced = false;
  } lanes[kLanes];
};

namespace {

WarpProducts& mine() {
  auto& products = warp_products();
  if (!products) products = std::make_shared<WarpProducts>();
  return *products;
}

// Row and column of a lane's value i: see fi/cuda/sm90/wgmma.h.
float& sum_at(Accumulators& c, int lane, int i) {
  const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return c.sums[size_t(row) * c.columns + column];
}

// A lane's accumulators: those of products that run, or new ones, which take the registers' values.
void take_accumulators(WarpProducts& warp, Product& product, int lane, float* d, size_t nth) {
  if (!product.accumulators) {
    for (const auto& c : warp.accumulators)
      if (c->d[lane] == d) product.accumulators = c;
    if (!product.accumulators) {
      product.accumulators = warp.accumulators.emplace_back(std::make_shared<Accumulators>());
      product.accumulators->columns = product.form.columns;
      product.accumulators->sums.resize(size_t{kRows} * product.form.columns);
    }
  }
  Accumulators& c = *product.accumulators;
  if (c.columns != product.form.columns) fail("wgmma: products of other widths share accumulators");
  c.last_product = nth;
  if (c.d[lane] == d) return;
  if (c.d[lane]) fail("wgmma: lanes differ in their accumulators");
  c.d[lane] = d;
  for (int i = 0; i < c.columns / 2; ++i) {
    sum_at(c, lane, i) = d[i];
    std::memcpy(&d[i], &kPoison, 4);
  }
}

void gather_a(unsigned char* to, const Product& product, const unsigned char* smem) {
  if (!product.form.a_in_registers)
    return gather_k_major(to, smem, read_descriptor(product.operands.a), current().warp % 4 * kRows, kRows);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      std::memcpy(to + (lane / 4 + i % 2 * 8) * kRowBytes + i / 2 * 16 + lane % 4 * 4, &product.a_at[lane][i],
                  4);
}

void compute(Product& product) {
  const ProductForm& form = product.form;
  const int k = k_of(form);
  float a[kRows * kMostK];
  unsigned char seen_by_threads[sizeof(product.a)];
  gather_a(product.a, product, smem_of_products());
  gather_a(seen_by_threads, product, dynamic_smem());
  check_fenced(seen_by_threads, product.a, sizeof(product.a));
  decode(a, product.a, kRows * k, form.a);
  product.b = read_b(form, product.operands.b);
  std::vector<float>& sums = product.accumulators->sums;
  if (!product.operands.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  multiply(sums.data(), a, product.b->values.data(), k, form.columns);
}

// What the hardware might have read later than it was read here.
void check_operands(const Product& product) {
  unsigned char a[kRows * kRowBytes];
  gather_a(a, product, dynamic_smem());
  if (std::memcmp(a, product.a, sizeof(a)) != 0) fail("wgmma: operand a was written before the wait");
  if (gather_b(product.form, product.operands.b, dynamic_smem()) != product.b->bytes)
    fail("wgmma: operand b was written before the wait");
}

void deliver(Accumulators& c) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < c.columns / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &c.d[lane][i], 4);
      if (bits != kPoison) fail("wgmma: an accumulator was written before the wait");
      c.d[lane][i] = sum_at(c, lane, i);
    }
}

}  // namespace

void start_product(const ProductForm& form, const ProductOperands& operands) {
  WarpProducts& warp = mine();
  const int lane = current().lane;
  WarpProducts::Lane& self = warp.lanes[lane];
  if (!self.fenced) fail("wgmma: no wgmma_fence since its registers could be written");
  const size_t nth = self.started++;
  while (warp.finished + warp.running.size() <= nth) {
    Product& product = warp.running.emplace_back();
    product.form = form;
    product.operands = operands;
  }
  Product& product = warp.running[nth - warp.finished];
  const ProductOperands& first = product.operands;
  if (!(product.form == form) || first.a != operands.a || first.b != operands.b ||
      first.accumulate != operands.accumulate)
    fail("wgmma: lanes differ in a product");
  product.a_at[lane] = operands.a_registers;
  take_accumulators(warp, product, lane, operands.d, nth);
  if (++product.lanes == kLanes) compute(product);
}

void fence_products() {
  const char nothing = 0;
  meet_warp(0xffffffffu, "wgmma_fence", &nothing, 1);
  mine().lanes[current().lane].fenced = true;
}

void commit_products() {
  WarpProducts::Lane& self = mine().lanes[current().lane];
  self.groups.push_back(self.started);
}

void wait_for_products(int pending) {
  const char nothing = 0;
  meet_warp(0xffffffffu, "wgmma_wait", &nothing, 1);
  WarpProducts& warp = mine();
  WarpProducts::Lane& self = warp.lanes[current().lane];
  self.fenced = false;
  if (self.groups.size() <= size_t(pending)) return;
  const size_t done = self.groups[self.groups.size() - 1 - pending];
  self.groups.erase(self.groups.begin(), self.groups.end() - pending);
  // The first lane to get here does the rest for all.
  for (; warp.finished < done; ++warp.finished, warp.running.pop_front()) {
    if (warp.running.front().lanes != kLanes) fail("wgmma: some lanes have not asked for a product");
    check_operands(warp.running.front());
  }
  std::erase_if(warp.accumulators, [&](const auto& c) {
    if (c->last_product >= done) return false;
    deliver(*c);
    return true;
  });
}

}  // namespace fi::emulation
