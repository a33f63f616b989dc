// The op of preconditioned.inl: W <- round(W - decay W + delta), with delta and new state by a rule.
#include "pieces.h"

namespace {

using namespace pgap;

struct RuleInfo {
    const char* name;
    Rule rule;
    size_t states;
    int64_t scalars;
};
constexpr RuleInfo kRules[] = {
    {.name = "perturb", .rule = Rule::perturb, .states = 1, .scalars = 0},
    {.name = "around", .rule = Rule::around, .states = 1, .scalars = 1},
    {.name = "momentum", .rule = Rule::momentum, .states = 1, .scalars = 2},
    {.name = "adam", .rule = Rule::adam, .states = 2, .scalars = 7},
    {.name = "hizoo", .rule = Rule::hizoo, .states = 1, .scalars = 3},
    {.name = "helene", .rule = Rule::helene, .states = 2, .scalars = kMaxRuleScalars},
    {.name = "helene_refresh", .rule = Rule::helene_refresh, .states = 2, .scalars = kMaxRuleScalars},
    {.name = "adamu", .rule = Rule::adamu, .states = 1, .scalars = kMaxRuleScalars},
};

const RuleInfo& parse_rule(const std::string& name) {
    for (const RuleInfo& info : kRules)
        if (name == info.name) return info;
    STD_TORCH_CHECK(false, "rule: accepted: perturb, around, momentum, adam, hizoo, helene, helene_refresh, adamu");
}

// gradient and restore: the coefficients of g and b.
void preconditioned(std::vector<Tensor> weights, std::vector<Tensor> out, std::vector<Tensor> state0,
                    std::vector<Tensor> state1, Tensor keys, Tensor gradient, Tensor restore, Tensor scalars,
                    std::string rule, Tensor decay, std::optional<Tensor> rounding_key,
                    std::vector<int64_t> tensor_ids, std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    const RuleInfo& info = parse_rule(rule);
    check_cpu(keys, ScalarType::Long, "keys");
    STD_TORCH_CHECK(keys.numel() > 0, "keys: accepted: at least one draw");
    const std::vector<float> c = broadcast_scalars(gradient, keys.numel(), count, "gradient");
    const std::vector<float> r = broadcast_scalars(restore, keys.numel(), count, "restore");
    const std::vector<float> s = broadcast_scalars(scalars, info.scalars, count, "scalars");
    const std::vector<float> d = broadcast_scalars(decay, 1, count, "decay");
    const DType dtype = parse_dtype(out[0]);
    STD_TORCH_CHECK(!weights.empty(), "weights: accepted: lists of one length");
    STD_TORCH_CHECK(!state0.empty() && state1.empty() == (info.states == 1),
                    "state0, state1: accepted: the rule's states");
    std::vector<Piece> pieces = make_pieces(weights, out, tensor_ids, slices, dtype);
    const bool updates_state = info.rule != Rule::perturb && info.rule != Rule::around;
    attach_companions(pieces, &Piece::state0, state0, DType::f32, updates_state, "state0");
    attach_companions(pieces, &Piece::state1, state1, DType::f32, updates_state, "state1");
    const PreconditionedPass pass = {.dtype = dtype,
                                     .draws = parse_draws(distribution, keys, c, count),
                                     .restore = r.data(),
                                     .rule = info.rule,
                                     .scalar_count = info.scalars,
                                     .scalars = s.data(),
                                     .decay = d.data(),
                                     .rounding_key = parse_rounding_keys(rounding_key)};
    pieces = join_or_split_rows(pieces, dtype);
    parallel_for_groups(pieces, [&](size_t i, int64_t begin, int64_t end) {
        kernels().preconditioned(pass, pieces[i], begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("preconditioned(Tensor[] weights, Tensor(a!)[] out, Tensor(b!)[] state0, Tensor(c!)[] state1, Tensor keys, "
          "Tensor gradient, Tensor restore, Tensor scalars, str rule, Tensor decay, Tensor? rounding_key, "
          "int[] tensor_ids, int[] slices, str distribution) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("preconditioned", TORCH_BOX(&preconditioned));
}
