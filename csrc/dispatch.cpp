// Picks one build of the kernels: the best the CPU runs, or a lower one named by PGAP_ISA.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include "kernels.h"

namespace pgap {

namespace {

const Kernels* const kBuilds[] = {  // best first; generic runs anywhere
#if defined(__x86_64__) && defined(__GNUC__)
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_generic};

bool runs(const Kernels* build) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();  // checks what the operating system saves, too
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (build == &kernels_avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (build == &kernels_avx512) return avx512;
    if (build == &kernels_avx512_bf16)
        return avx512 && __builtin_cpu_supports("avx512bf16") && isa_avx512_bf16::adds_in_order();
#endif
    return build == &kernels_generic;
}

const Kernels* best() {
    for (const Kernels* build : kBuilds)
        if (runs(build)) return build;
    return &kernels_generic;
}

const Kernels* named(const char* wanted) {
    for (const Kernels* build : kBuilds)
        if (!std::strcmp(build->name, wanted)) {
            if (runs(build)) return build;
            throw std::runtime_error(std::string("PGAP_ISA: got '") + wanted + "', which this CPU does not run; best: " +
                                     best()->name);
        }
    throw std::runtime_error(std::string("PGAP_ISA: got '") + wanted + "'; accepted: avx512_bf16, avx512, avx2, generic");
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> build = [] {
        const char* wanted = std::getenv("PGAP_ISA");
        return wanted && *wanted ? named(wanted) : best();
    }();
    return build;
}

}  // namespace

const char* best_isa() { return best()->name; }

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use(const char* isa) { chosen().store(named(isa), std::memory_order_relaxed); }

}  // namespace pgap
