#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace spdnn::cpu {

extern const Kernels kernels_baseline;
#ifdef SPDNN_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

}  // namespace

const Kernels* select_kernels(const char** error) {
#ifdef SPDNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Choice choices[] = {{&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_baseline, true}};
#else
  const Choice choices[] = {{&kernels_baseline, true}};
#endif
  const char* wanted = std::getenv("SPDNN_CPU_KERNELS");
  for (const Choice& choice : choices) {
    if (choice.supported && (!wanted || std::strcmp(wanted, choice.kernels->name) == 0)) return choice.kernels;
  }
  *error =
      "SPDNN_CPU_KERNELS names no kernels that run on this processor: unset it, or choose baseline, avx2 or avx512";
  return nullptr;
}

}  // namespace spdnn::cpu
