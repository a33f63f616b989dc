#include "shapes.h"

namespace pgap {
namespace {

struct Stages { std::vector<int64_t> draws; float decay; bool stochastic; };
const Stages kStages[] = {
    {.draws = {1}, .decay = 0, .stochastic = false},         {.draws = {2}, .decay = 0.5f, .stochastic = false},
    {.draws = {1, 0, 2}, .decay = 0.25f, .stochastic = true}, {.draws = {0}, .decay = 0.5f, .stochastic = true},
    {.draws = {1, 1}, .decay = 0, .stochastic = false},      {.draws = {1}, .decay = 0, .stochastic = true}};
enum class Source { none, apart, same };

void dense_case(Run& run, const std::string& name, DType dtype, const Shape& s, Distribution distribution,
                const Stages& stages, Source source) {
    int64_t draws = 0;
    for (const int64_t n : stages.draws) draws += n;
    const int64_t stage_count = int64_t(stages.draws.size());
    const std::vector<float> a = scalar_table(draws, 1.0f), decay = scalar_table(stage_count, stages.decay);
    const std::vector<uint64_t> keys(kKeys, kKeys + draws), rounding(kRoundingKeys, kRoundingKeys + stage_count);
    const DensePass pass = {.dtype = dtype,
                            .draws = make_draws(distribution, keys, a),
                            .stages = stage_count,
                            .draws_per_stage = stages.draws.data(),
                            .decay = decay.data(),
                            .rounding_keys = stages.stochastic ? rounding.data() : nullptr};
    for (const Cut cut : kCuts) {
        const Fill fill = source == Source::same ? Fill::mixed : Fill::nan;
        Matrix in(dtype, s.rows, s.cols, s.gap, 3, 1), out(dtype, s.rows, s.cols, s.gap * 2, 1, 1, fill);
        const Piece p = make_piece(s, source == Source::none ? nullptr : source == Source::same ? &out : &in, &out);
        for_each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
            run.k.dense(pass, part, begin, end);
        });
        Digest digest;
        out.add_to(digest);
        run.same(name, digest.value);
        run.expect(out.guards_intact() && in.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_dense(Run& run) {
    for_each_shape("dense", [&](DType dtype, const Shape& s, int64_t i, const std::string& name) {
        for (const Distribution distribution : kDistributions)
            for (const Source source : {Source::none, Source::apart, Source::same})
                for (int64_t v = i % 2; v < 6; v += 2)
                    dense_case(run, name + " " + std::to_string(int(distribution)) + std::to_string(int(source)) +
                                        std::to_string(v),
                               dtype, s, distribution, kStages[v], source);
    });
}

}  // namespace pgap
