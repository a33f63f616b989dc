#include "shapes.h"

namespace pgap {
namespace {

void masked_case(Run& run, const std::string& name, DType dtype, const Shape& s, int64_t i, Mask mask,
                 bool stochastic) {
    const int64_t draws = i % 3;
    const std::vector<float> a = scalar_table(draws, 1.0f), decay = scalar_table(1, i % 2 ? 100.0f : 0.0f);
    const std::vector<float> threshold = scalar_table(1, 250.0f);
    const std::vector<uint64_t> keys(kKeys, kKeys + draws);
    const MaskedPass pass = {.dtype = dtype,
                             .draws = make_draws(kDistributions[i % 2], keys, a),
                             .decay = decay.data(),
                             .rounding_key = stochastic ? kRoundingKeys : nullptr,
                             .mask = mask,
                             .threshold = threshold.data(),
                             .mask_key = 23,
                             .word_limit = i == 0 ? int64_t(1) << 32 : int64_t(3) << 30};
    for (const Cut cut : kCuts) {
        if (mask == Mask::bits && cut == Cut::columns) continue;  // bits are counted along whole rows
        Matrix out(dtype, s.rows, s.cols, s.gap, 1, 2);
        Matrix bits(DType::f32, 1, (s.rows * s.cols + 31) / 32, 0, 1, 3);
        Piece p = make_piece(s, &out, &out);
        if (mask == Mask::bits) p.mask_bits = (const uint32_t*)bits.at(0);
        for_each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
            run.k.masked(pass, part, begin, end);
        });
        Digest digest;
        out.add_to(digest);
        run.same(name, digest.value);
        run.expect(out.guards_intact() && bits.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_masked(Run& run) {
    for_each_shape("masked", [&](DType dtype, const Shape& s, int64_t i, const std::string& name) {
        for (const Mask mask : {Mask::threshold, Mask::share, Mask::bits})
            for (const bool stochastic : {false, true})
                masked_case(run, name + " " + std::to_string(int(mask)) + std::to_string(stochastic), dtype, s, i, mask,
                            stochastic);
    });
}

}  // namespace pgap
