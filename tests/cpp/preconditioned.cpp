#include "shapes.h"

namespace pgap {
namespace {

struct RuleInfo { Rule rule; int states; int64_t scalars; };
constexpr RuleInfo kRules[] = {
    {.rule = Rule::perturb, .states = 1, .scalars = 0}, {.rule = Rule::momentum, .states = 1, .scalars = 2},
    {.rule = Rule::adam, .states = 2, .scalars = 7},    {.rule = Rule::hizoo, .states = 1, .scalars = 3},
    {.rule = Rule::helene, .states = 2, .scalars = 8},  {.rule = Rule::helene_refresh, .states = 2, .scalars = 8},
    {.rule = Rule::around, .states = 1, .scalars = 1},  {.rule = Rule::adamu, .states = 1, .scalars = 8}};

bool reads_state_alone(Rule rule) { return rule == Rule::perturb || rule == Rule::around; }

void preconditioned_case(Run& run, const std::string& name, DType dtype, const Shape& s, int64_t i,
                         const RuleInfo& info) {
    const int64_t draws = 1 + i % 2;
    const std::vector<float> c = scalar_table(draws, 1.0f), r = scalar_table(draws, -2.0f);
    const std::vector<float> decay = scalar_table(1, i % 3 * 40.0f), scalars = scalar_table(info.scalars, 1.0f);
    const std::vector<uint64_t> keys(kKeys, kKeys + draws);
    const PreconditionedPass pass = {.dtype = dtype,
                                     .draws = make_draws(kDistributions[i / 2 % 2], keys, c),
                                     .restore = r.data(),
                                     .rule = info.rule,
                                     .scalar_count = info.scalars,
                                     .scalars = scalars.data(),
                                     .decay = decay.data(),
                                     .rounding_key = i % 2 ? kRoundingKeys : nullptr};
    for (const Cut cut : kCuts) {
        Matrix out(dtype, s.rows, s.cols, s.gap, 3, 4);
        Matrix state0(DType::f32, s.rows, s.cols, s.gap + 1, 1, 5, Fill::positive);
        Matrix state1(DType::f32, s.rows, s.cols, s.gap / 2, 2, 6, Fill::positive);
        Piece p = make_piece(s, &out, &out);
        p.state0 = state0.companion();
        if (info.states == 2) p.state1 = state1.companion();
        for_each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
            run.k.preconditioned(pass, part, begin, end);
        });
        Digest digest;
        out.add_to(digest);
        state0.add_to(digest);
        state1.add_to(digest);
        run.same(name, digest.value);
        run.expect(out.guards_intact() && state0.guards_intact() && state1.guards_intact(), name + ": memory beside");
        run.expect((!reads_state_alone(info.rule) || state0.untouched()) && (info.states == 2 || state1.untouched()),
                   name + ": states that the rule does not update");
    }
}

}  // namespace

void test_preconditioned(Run& run) {
    for_each_shape("preconditioned", [&](DType dtype, const Shape& s, int64_t i, const std::string& name) {
        for (const RuleInfo& info : kRules)
            preconditioned_case(run, name + " rule " + std::to_string(int(info.rule)), dtype, s, i, info);
    });
}

}  // namespace pgap
