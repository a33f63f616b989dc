// One build of the kernels under test, and what the first build gave.
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
    // The same case gives the same bits in every build and however it is cut.
    void same(const std::string& name, uint64_t digest) {
        const auto [first, added] = results.digests.emplace(name, digest);
        expect(added || first->second == digest, name + ": other bits");
    }
};

void test_noise(Run&, const char* known_answers);
void test_conversions(Run&);
void test_pieces(Run&);
void test_low_rank(Run&);
void test_forward(Run&);

}  // namespace pgap
