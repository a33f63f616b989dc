// The kernels under test, and the results of the first instruction set, which those of the others must equal.
#pragma once
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#include "kernels.h"
#include "memory.h"

namespace pgap {

// How the work of a pass is spread over calls, none of which may change a bit.
enum class Cut { none, singles, rows, columns };
constexpr Cut kCuts[] = {Cut::none, Cut::singles, Cut::rows, Cut::columns};

struct Results {
    std::map<std::string, uint64_t> digests;  // of every case
    int64_t failures = 0;
};

struct Run {
    const Kernels& k;
    Results& results;

    void expect(bool condition, const std::string& what) {
        if (condition) return;
        if (++results.failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", k.name, what.c_str());
    }
    // A case gives the same bits on every instruction set and however it is cut.
    void same(const std::string& name, uint64_t digest) {
        const auto [known, added] = results.digests.emplace(name, digest);
        expect(added || known->second == digest, name + ": other bits");
    }
};

void test_noise(Run&, const char* known_answers);
void test_convert(Run&);
void test_round(Run&);
void test_dense(Run&);
void test_masked(Run&);
void test_preconditioned(Run&);
void test_anchor(Run&);
void test_reduction(Run&);
void test_lowrank(Run&);
void test_forward(Run&);

}  // namespace pgap
