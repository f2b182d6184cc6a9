// The choice of the instruction set at run time. Compiled for the oldest processor, like everything outside of isa/.
#include <cstdlib>
#include <cstring>

#include "isa/kernels.h"

namespace gistops {

#define GISTOPS_DECLARE(isa)                              \
  extern const Kernels<float>* const table_##isa##_float; \
  extern const Kernels<double>* const table_##isa##_double;

GISTOPS_DECLARE(baseline)
#ifdef GISTOPS_X86
GISTOPS_DECLARE(v3)
GISTOPS_DECLARE(v4)
#endif

namespace {

enum class Isa { baseline, v3, v4 };

Isa detect() {
  Isa best = Isa::baseline;
#ifdef GISTOPS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) best = Isa::v3;
  if (__builtin_cpu_supports("x86-64-v4")) best = Isa::v4;
  // For tests and comparisons: an older instruction set than the best one, never a newer one.
  if (const char* asked = std::getenv("GISTOPS_CPU_CAPABILITY")) {
    if (best > Isa::v3 && std::strcmp(asked, "v3") == 0) best = Isa::v3;
    if (std::strcmp(asked, "baseline") == 0) best = Isa::baseline;
  }
#endif
  return best;
}

const Isa chosen = detect();

}  // namespace

#ifdef GISTOPS_X86
#define GISTOPS_TABLE(T) (chosen == Isa::v4 ? *table_v4_##T : chosen == Isa::v3 ? *table_v3_##T : *table_baseline_##T)
#else
#define GISTOPS_TABLE(T) (*table_baseline_##T)
#endif

template <>
const Kernels<float>& kernels<float>() {
  return GISTOPS_TABLE(float);
}

template <>
const Kernels<double>& kernels<double>() {
  return GISTOPS_TABLE(double);
}

}  // namespace gistops
