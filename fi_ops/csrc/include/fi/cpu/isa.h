// ISA levels: how a kernel compiled once per level is declared and chosen at run time.
//
// A kernel file is compiled with -DFI_ISA=<name> -DFI_ISA_LEVEL=<0..4> and defines its entry points in
// namespace fi::FI_ISA. The builder passes FI_ISA_MASK, the levels that exist in this library (bit i: level
// i).
#pragma once

#ifndef FI_ISA_MASK
#  error "compile through fi_ops/_build.py, which defines FI_ISA_MASK"
#endif

namespace fi::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

inline constexpr const char* isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
inline constexpr int num_isas = 5;

// The best level that this library, this CPU and this kernel (of the OS) have; FI_OPS_CPU_ISA=<name> lowers
// it. Read once.
Isa current_isa();

// The entry point of the best level not above `isa`; levels missing from the library are null.
template <class F>
F* pick(F* const (&table)[num_isas], Isa isa) {
  int level = static_cast<int>(isa);
  while (level > 0 && table[level] == nullptr) --level;
  return table[level];
}

}  // namespace fi::cpu

#if FI_ISA_MASK & 2
#  define FI_AVX2(...) __VA_ARGS__
#else
#  define FI_AVX2(...)
#endif
#if FI_ISA_MASK & 4
#  define FI_AVX512(...) __VA_ARGS__
#else
#  define FI_AVX512(...)
#endif
#if FI_ISA_MASK & 8
#  define FI_AVX512_BF16(...) __VA_ARGS__
#else
#  define FI_AVX512_BF16(...)
#endif
#if FI_ISA_MASK & 16
#  define FI_AMX(...) __VA_ARGS__
#else
#  define FI_AMX(...)
#endif

// Declares `ret name args;` in each level's namespace, and `fi::cpu::name_for(isa)` to choose among them.
#define FI_DECLARE_KERNEL(ret, name, args)                     \
  namespace fi::baseline {                                     \
  ret name args;                                               \
  }                                                            \
  FI_AVX2(namespace fi::avx2 { ret name args; })               \
  FI_AVX512(namespace fi::avx512 { ret name args; })           \
  FI_AVX512_BF16(namespace fi::avx512_bf16 { ret name args; }) \
  FI_AMX(namespace fi::amx { ret name args; })                 \
  namespace fi::cpu {                                          \
  inline auto name##_for(Isa isa) {                            \
    using F = decltype(fi::baseline::name);                    \
    F* table[num_isas] = {&fi::baseline::name};                \
    FI_AVX2(table[1] = &fi::avx2::name;)                       \
    FI_AVX512(table[2] = &fi::avx512::name;)                   \
    FI_AVX512_BF16(table[3] = &fi::avx512_bf16::name;)         \
    FI_AMX(table[4] = &fi::amx::name;)                         \
    return pick<F>(table, isa);                                \
  }                                                            \
  }

#define FI_DISPATCH(name) (::fi::cpu::name##_for(::fi::cpu::current_isa()))
