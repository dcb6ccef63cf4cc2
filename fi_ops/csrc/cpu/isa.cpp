// Which ISA level this process runs: what the library has, what the CPU and the OS have, what the user
// allows.
#include "fi/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#  include <cpuid.h>
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace fi::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// AMX state must be asked for once a process (arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)); threads made later
// inherit it.
bool amx_permitted() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  bool has_tiles = (d >> 24 & 1) != 0, has_bf16 = (d >> 22 & 1) != 0;
  return has_tiles && has_bf16 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// __builtin_cpu_supports also asks the OS (XGETBV) whether it saves the registers.
int machine_level() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return 0;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  return amx_permitted() ? 4 : 3;
}
#else
int machine_level() { return 0; }
#endif

Isa detect() {
  int level = machine_level();
  while (level > 0 && !(FI_ISA_MASK >> level & 1)) --level;
  const char* wanted = std::getenv("FI_OPS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return static_cast<Isa>(level);
  std::string known;
  for (int i = 0; i < num_isas; ++i) {
    if (std::string(wanted) == isa_names[i]) return static_cast<Isa>(i < level ? i : level);
    known += (i ? ", " : "") + std::string(isa_names[i]);
  }
  throw std::runtime_error("fi_ops: FI_OPS_CPU_ISA must be one of " + known + ", got " + wanted +
                           "; unset it for the best level");
}

}  // namespace

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace fi::cpu

// For Python (ctypes): the level in use, or null when FI_OPS_CPU_ISA is not a level.
extern "C" __attribute__((visibility("default"))) const char* fi_ops_cpu_isa() {
  try {
    return fi::cpu::isa_names[static_cast<int>(fi::cpu::current_isa())];
  } catch (const std::exception&) {
    return nullptr;
  }
}
