// Every build of the kernels that this CPU runs, on the same cases. Prints a digest of what they gave.
//     kernel_tests tests/data/philox4x32_kat.txt [--cases]
#include <stdexcept>

#include "run.h"

using namespace pgap;

namespace {

void test_dispatch(Results& results) {
    std::string problem = "nothing";
    for (int64_t i = 0; const Kernels* one = build(i); ++i) {
        use(one->name);
        Run{*one, results}.expect(&kernels() == one, "use");
    }
    try {
        use("sse9");
    } catch (const std::runtime_error& error) {
        problem = error.what();
    }
    Run run = {kernels_generic, results};
    run.expect(problem.find("PGAP_ISA: got 'sse9'; accepted: ") == 0, "an unknown build is an error: " + problem);
    for (int64_t i = 0; const Kernels* one = build(i); ++i)
        run.expect(problem.find(one->name) != std::string::npos, "which names the known ones: " + problem);
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) return std::fprintf(stderr, "usage: %s known-answers [--cases]\n", arguments[0]), 2;
    Results results;
    test_dispatch(results);
    std::string names;
    for (int64_t i = 0; const Kernels* one = build(i); ++i) {
        Run run = {*one, results};
        test_noise(run, arguments[1]);
        test_conversions(run);
        test_pieces(run);
        test_low_rank(run);
        test_forward(run);
        names += std::string(i ? ", " : "") + one->name;
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
