// Picks one build of the kernels: the best the CPU runs, or a lower one named by PGAP_ISA.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include "kernels.h"

namespace pgap {

namespace {

const Kernels* const kBuilds[] = {  // best first
#if defined(__x86_64__) && defined(__GNUC__)
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_generic};

bool runs(const Kernels* one) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();  // checks what the operating system saves, too
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (one == &kernels_avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (one == &kernels_avx512) return avx512;
    if (one == &kernels_avx512_bf16)
        return avx512 && __builtin_cpu_supports("avx512bf16") && isa_avx512_bf16::adds_in_order();
#endif
    return one != nullptr;  // generic runs anywhere, neon on every aarch64
}

const Kernels* named(const char* wanted) {
    std::string accepted;
    for (const Kernels* one : kBuilds) {
        if (!std::strcmp(one->name, wanted)) {
            if (runs(one)) return one;
            throw std::runtime_error(std::string("PGAP_ISA: got '") + wanted +
                                     "', which this CPU does not run; best: " + best_isa());
        }
        accepted += (accepted.empty() ? "" : ", ") + std::string(one->name);
    }
    throw std::runtime_error(std::string("PGAP_ISA: got '") + wanted + "'; accepted: " + accepted);
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> in_use = [] {
        const char* wanted = std::getenv("PGAP_ISA");
        return wanted && *wanted ? named(wanted) : build(0);
    }();
    return in_use;
}

}  // namespace

const Kernels* build(int64_t number) {
    for (const Kernels* one : kBuilds)
        if (runs(one) && number-- == 0) return one;
    return nullptr;
}

const char* best_isa() { return build(0)->name; }

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use(const char* isa) { chosen().store(named(isa), std::memory_order_relaxed); }

}  // namespace pgap
