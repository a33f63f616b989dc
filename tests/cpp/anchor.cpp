#include "shapes.h"

namespace pgap {
namespace {

// In place or not, the bits are the same.
void anchor_case(Run& run, const std::string& name, DType dtype, const Shape& s, int64_t i, DType companion_dtype,
                 bool has_delta, bool stochastic) {
    const std::vector<float> c = scalar_table(1, 900.0f);
    const AnchorPass pass = {
        .dtype = dtype, .coefficient = c.data(), .rounding_key = stochastic ? kRoundingKeys : nullptr};
    for (const bool in_place : {true, false})
        for (const Cut cut : kCuts) {
            Matrix weights(dtype, s.rows, s.cols, s.gap, i % 4, 7);
            Matrix apart(dtype, s.rows, s.cols, s.gap * 2, 1, 0, Fill::nan);
            Matrix anchor(companion_dtype, s.rows, s.cols, s.gap + 1, 1, 8);
            Matrix delta(companion_dtype, s.rows, s.cols, s.gap * 2, 5, 9);
            Matrix& out = in_place ? weights : apart;
            Piece p = make_piece(s, in_place || !has_delta ? &weights : nullptr, &out);
            p.anchor = anchor.companion();
            if (has_delta) p.delta = delta.companion();
            for_each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
                run.k.anchor(pass, part, begin, end);
            });
            Digest digest;
            out.add_to(digest);
            run.same(name, digest.value);
            run.expect(out.guards_intact() && (in_place || weights.untouched()) && anchor.untouched() &&
                           delta.untouched(),
                       name + ": memory beside");
        }
}

}  // namespace

void test_anchor(Run& run) {
    for_each_shape("anchor", [&](DType dtype, const Shape& s, int64_t i, const std::string& name) {
        for (const DType companion_dtype : {DType::f32, dtype})
            for (const bool has_delta : {false, true})
                for (const bool stochastic : {false, true})
                    anchor_case(run, name + " " + std::to_string(int(companion_dtype)) + std::to_string(has_delta) +
                                         std::to_string(stochastic),
                                dtype, s, i, companion_dtype, has_delta, stochastic);
    });
}

}  // namespace pgap
