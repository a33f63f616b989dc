// Chooses the kernels: those of the best instruction set that the CPU has, or of the one that PGAP_ISA names.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include "kernels.h"

namespace pgap {

namespace {

const Kernels* const kCompiled[] = {  // best first
#if defined(__x86_64__) && defined(__GNUC__)
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_generic};

bool cpu_supports(const Kernels* candidate) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();  // also asks whether the operating system saves the registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (candidate == &kernels_avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (candidate == &kernels_avx512) return avx512;
    if (candidate == &kernels_avx512_bf16)
        return avx512 && __builtin_cpu_supports("avx512bf16") && isa_avx512_bf16::adds_in_order();
#endif
    return candidate != nullptr;  // every CPU runs generic, and every aarch64 CPU runs neon
}

const Kernels* find_kernels(const char* name) {
    std::string accepted;
    for (const Kernels* candidate : kCompiled) {
        if (!std::strcmp(candidate->name, name)) {
            if (cpu_supports(candidate)) return candidate;
            throw std::runtime_error(std::string("PGAP_ISA: got '") + name + "', which this CPU does not run; best: " +
                                     supported_kernels(0)->name);
        }
        accepted += (accepted.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::runtime_error(std::string("PGAP_ISA: got '") + name + "'; accepted: " + accepted);
}

// Atomic, because the threads of an op read it.
std::atomic<const Kernels*>& kernels_in_use() {
    static std::atomic<const Kernels*> in_use = [] {
        const char* name = std::getenv("PGAP_ISA");
        return name && *name ? find_kernels(name) : supported_kernels(0);
    }();
    return in_use;
}

}  // namespace

const Kernels* supported_kernels(int64_t index) {
    for (const Kernels* candidate : kCompiled)
        if (cpu_supports(candidate) && index-- == 0) return candidate;
    return nullptr;
}

const Kernels& kernels() { return *kernels_in_use().load(std::memory_order_relaxed); }

void select_isa(const char* name) { kernels_in_use().store(find_kernels(name), std::memory_order_relaxed); }

}  // namespace pgap
