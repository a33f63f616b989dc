#include "panels.h"
#include "run.h"

namespace pgap {
namespace {

struct ForwardShape {
    int64_t rank, tokens, in_features, out_features;
    DType inputs_type, factor_in_type, outputs_type;
    bool has_indices, has_core;
};

// The matrix, with zeros behind the first `rank` of every `padded_rank` floats.
void zero_padding(Matrix& m, int64_t rank, int64_t padded_rank) {
    for (int64_t i = 0; i < m.cols; ++i)
        if (i % padded_rank >= rank) m.floats()[i] = 0;
}

void forward_case(Run& run, const std::string& name, const ForwardShape& s) {
    const int64_t padded_rank = (s.rank + 7) / 8 * 8;
    Matrix x(s.inputs_type, s.tokens, s.in_features, s.rank % 3, 1, 15);
    const Matrix factor_out = pack_panels(Matrix(DType::f32, s.rank, s.out_features, 0, 0, 16), 0, s.out_features,
                                          run.k.forward_panel);
    Matrix factor_in(s.has_indices ? s.factor_in_type : DType::f32, 1,
                     s.in_features * (s.has_indices ? s.rank : padded_rank), 0, 0, 17);
    if (!s.has_indices) zero_padding(factor_in, s.rank, padded_rank);
    Matrix core(DType::f32, 1, s.rank * padded_rank, 0, 0, 18);
    zero_padding(core, s.rank, padded_rank);
    std::vector<int64_t> indices(static_cast<size_t>(s.tokens));
    for (size_t i = 0; i < indices.size(); ++i) indices[i] = int64_t(hashed(i) % uint64_t(s.in_features));
    for (const Cut cut : kCuts) {
        Matrix y(s.outputs_type, s.tokens, s.out_features, 0, 1, 19);
        Matrix scratch(DType::f32, 1, kForwardScratch, 0, 0, 0, Fill::nan);
        const ForwardPass pass = {.inputs_type = s.inputs_type,
                                  .factor_in_type = factor_in.dtype,
                                  .outputs_type = s.outputs_type,
                                  .inputs = s.has_indices ? nullptr : x.at(0),
                                  .indices = s.has_indices ? indices.data() : nullptr,
                                  .ld_inputs = x.ld,
                                  .in_features = s.in_features,
                                  .out_features = s.out_features,
                                  .rank = s.rank,
                                  .padded_rank = padded_rank,
                                  .factor_in = factor_in.at(0),
                                  .factor_out = factor_out.floats(),
                                  .core = s.has_core ? core.floats() : nullptr,
                                  .coefficient = -0.75f,
                                  .outputs = y.at(0)};
        const int64_t step = cut == Cut::none ? s.tokens : cut == Cut::singles ? 1 : cut == Cut::rows ? 4 : 13;
        for (int64_t begin = 0; begin < s.tokens; begin += step)
            run.k.forward(pass, begin, begin + step < s.tokens ? begin + step : s.tokens,
                          scratch.floats());
        Digest digest;
        y.add_to(digest);
        run.same(name, digest.value);
        run.expect(y.guards_intact() && scratch.guards_intact() && x.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_forward(Run& run) {
    constexpr int64_t kTokens[] = {1, 3, 5, 9, 12, 29, 61}, kInputs[] = {1, 7, 40, 128, 129, 300},
                      kOutputs[] = {1, 15, 16, 17, 32, 37, 70};
    for (int64_t rank = 1; rank <= 141; ++rank) {
        const int64_t t = rank * 5;
        forward_case(run, "forward " + std::to_string(rank),
                     {.rank = rank == 141 ? kForwardMaxRank : rank,
                      .tokens = kTokens[t % 7],
                      .in_features = kInputs[t / 7 % 6],
                      .out_features = kOutputs[t / 3 % 7],
                      .inputs_type = DType(rank % 3),
                      .factor_in_type = DType(rank / 3 % 3),
                      .outputs_type = DType(rank / 5 % 3),
                      .has_indices = rank % 4 == 0,
                      .has_core = rank % 7 != 0});
    }
}

}  // namespace pgap
