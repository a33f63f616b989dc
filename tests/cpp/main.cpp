// Runs the same cases on every instruction set that this CPU supports, and prints a digest of the results.
//     kernel_tests tests/data/philox4x32_kat.txt [--cases]
#include <stdexcept>

#include "run.h"

using namespace pgap;

namespace {

void test_dispatch(Results& results) {
    std::string problem = "nothing";
    for (int64_t i = 0; const Kernels* k = supported_kernels(i); ++i) {
        select_isa(k->name);
        Run{*k, results}.expect(&kernels() == k, "select_isa");
    }
    try {
        select_isa("sse9");
    } catch (const std::runtime_error& error) {
        problem = error.what();
    }
    Run run = {kernels_generic, results};
    run.expect(problem.find("PGAP_ISA: got 'sse9'; accepted: ") == 0, "an unknown name is an error: " + problem);
    for (int64_t i = 0; const Kernels* k = supported_kernels(i); ++i)
        run.expect(problem.find(k->name) != std::string::npos, "which gives the known ones: " + problem);
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) return std::fprintf(stderr, "usage: %s known-answers [--cases]\n", arguments[0]), 2;
    Results results;
    test_dispatch(results);
    std::string names;
    for (int64_t i = 0; const Kernels* k = supported_kernels(i); ++i) {
        Run run = {*k, results};
        test_noise(run, arguments[1]);
        test_convert(run);
        test_round(run);
        test_dense(run);
        test_masked(run);
        test_preconditioned(run);
        test_anchor(run);
        test_reduction(run);
        test_lowrank(run);
        test_forward(run);
        names += std::string(i ? ", " : "") + k->name;
    }
    Digest all;
    for (const auto& [name, digest] : results.digests) {
        if (count > 2) std::printf("%016llx %s\n", (unsigned long long)digest, name.c_str());
        all.add(digest);
    }
    std::fprintf(stderr, "%s\n", names.c_str());
    std::printf("%zu passed, %lld failed, digest %016llx\n", results.digests.size(), (long long)results.failures,
                (unsigned long long)all.value);
    return results.failures ? 1 : 0;
}
