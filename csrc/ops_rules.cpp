// The ops of rules.inl: masked, preconditioned, affine, reduce. As in ops.cpp, checks here keep memory safe.
#include "pieces.h"

namespace {

using namespace pgap;

Draws draws_of(const Tensor& keys, const std::vector<float>& coefficients, int64_t columns,
               const std::string& distribution) {
    return {distribution_of(distribution), keys.numel(), columns, (const uint64_t*)keys.const_data_ptr(),
            coefficients.data()};
}

void masked(std::vector<Tensor> in, std::vector<Tensor> out, Tensor keys, Tensor coefficients, Tensor decay,
            std::optional<Tensor> rounding_key, std::string mask, Tensor mask_key, Tensor mask_level,
            std::vector<Tensor> mask_bits, std::vector<int64_t> tensor_ids, std::vector<int64_t> slices,
            std::string distribution) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    check_cpu(keys, ScalarType::Long, "keys");
    const std::vector<float> a = table_of(coefficients, keys.numel(), count, "coefficients");
    const std::vector<float> d = table_of(decay, 1, count, "decay");
    const DType dtype = dtype_of(out[0]);
    STD_TORCH_CHECK(!in.empty(), "weights: accepted: lists of one length");
    std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    MaskedPass pass = {dtype, draws_of(keys, a, count, distribution), d.data(), rounding_keys_of(rounding_key)};
    std::vector<float> threshold(size_t(count), 0.0f);
    if (mask == "threshold") {
        pass.mask = Mask::threshold;
        threshold = table_of(mask_level, 1, count, "mask_level");
    } else if (mask == "share") {
        pass.mask = Mask::share;
        check_cpu(mask_key, ScalarType::Long, "mask_key");
        check_cpu(mask_level, ScalarType::Long, "mask_level");
        STD_TORCH_CHECK(mask_key.numel() == 1 && mask_level.numel() == 1, "mask_key, mask_level: accepted: one each");
        pass.mask_key = *(const uint64_t*)mask_key.const_data_ptr();
        pass.word_limit = *(const int64_t*)mask_level.const_data_ptr();
    } else {
        STD_TORCH_CHECK(mask == "bits", "mask: accepted: threshold, share, bits");
        STD_TORCH_CHECK(mask_bits.size() == pieces.size(), "mask_bits: accepted: one tensor per weight");
        pass.mask = Mask::bits;
        for (size_t t = 0; t < pieces.size(); ++t) {
            check_cpu(mask_bits[t], ScalarType::Int, "mask_bits");
            STD_TORCH_CHECK(mask_bits[t].numel() >= (pieces[t].rows * pieces[t].cols + 31) / 32,
                            "mask_bits: accepted: a bit for every element");
            pieces[t].bits = (const uint32_t*)mask_bits[t].const_data_ptr();
        }
    }
    pass.threshold = threshold.data();
    const std::vector<Piece> split = regrouped(pieces, dtype);
    for_each_group(split, [&](size_t i, int64_t begin, int64_t end) { kernels().masked(pass, split[i], begin, end); });
}

// The rule of a name, with the numbers of its states and scalars.
struct RuleKind { const char* name; Rule rule; size_t states; int64_t scalars; };
constexpr RuleKind kRules[] = {
    {"perturb", Rule::perturb, 1, 0}, {"momentum", Rule::momentum, 1, 2}, {"adam", Rule::adam, 2, 7},
    {"hizoo", Rule::hizoo, 1, 3},     {"helene", Rule::helene, 2, 8},
    {"helene_refresh", Rule::helene_refresh, 2, 8}};

const RuleKind& rule_of(const std::string& name) {
    for (const RuleKind& kind : kRules)
        if (name == kind.name) return kind;
    STD_TORCH_CHECK(false, "rule: accepted: perturb, momentum, adam, hizoo, helene, helene_refresh");
}

void preconditioned(std::vector<Tensor> in, std::vector<Tensor> out, std::vector<Tensor> first,
                    std::vector<Tensor> second, Tensor keys, Tensor gradient, Tensor restore, Tensor scalars,
                    std::string rule, Tensor decay, std::optional<Tensor> rounding_key,
                    std::vector<int64_t> tensor_ids, std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    const RuleKind& kind = rule_of(rule);
    check_cpu(keys, ScalarType::Long, "keys");
    STD_TORCH_CHECK(keys.numel() > 0, "keys: accepted: at least one draw");
    const std::vector<float> c = table_of(gradient, keys.numel(), count, "gradient");
    const std::vector<float> r = table_of(restore, keys.numel(), count, "restore");
    const std::vector<float> s = table_of(scalars, kind.scalars, count, "scalars");
    const std::vector<float> d = table_of(decay, 1, count, "decay");
    const DType dtype = dtype_of(out[0]);
    STD_TORCH_CHECK(!in.empty(), "weights: accepted: lists of one length");
    STD_TORCH_CHECK(!first.empty() && second.empty() == (kind.states == 1),
                    "first, second: accepted: the rule's states");
    std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    const bool written = kind.rule != Rule::perturb;
    attach(pieces, &Piece::first, first, DType::f32, written, "first");
    attach(pieces, &Piece::second, second, DType::f32, written, "second");
    const PreconditionedPass pass = {dtype, draws_of(keys, c, count, distribution), r.data(), kind.rule, kind.scalars,
                                     s.data(), d.data(), rounding_keys_of(rounding_key)};
    const std::vector<Piece> split = regrouped(pieces, dtype);
    for_each_group(
        split, [&](size_t i, int64_t begin, int64_t end) { kernels().preconditioned(pass, split[i], begin, end); });
}

void affine(std::vector<Tensor> in, std::vector<Tensor> out, bool in_place, std::vector<Tensor> anchors,
            std::vector<Tensor> deltas, Tensor coefficient, std::optional<Tensor> rounding_key,
            std::vector<int64_t> tensor_ids, std::vector<int64_t> slices) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    const std::vector<float> c = table_of(coefficient, 1, count, "coefficient");
    const DType dtype = dtype_of(out[0]);
    STD_TORCH_CHECK(!anchors.empty(), "anchors: accepted: one tensor per weight");
    STD_TORCH_CHECK(in_place || !in.empty() || !deltas.empty(), "weights: accepted: one per output, without deltas");
    std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    if (in_place)
        for (Piece& p : pieces) p.in = p.out, p.ld_in = p.ld_out;
    attach(pieces, &Piece::first, anchors, dtype, false, "anchors");
    attach(pieces, &Piece::second, deltas, dtype, false, "deltas");
    const AffinePass pass = {dtype, c.data(), rounding_keys_of(rounding_key)};
    const std::vector<Piece> split = regrouped(pieces, dtype);
    for_each_group(split, [&](size_t i, int64_t begin, int64_t end) { kernels().affine(pass, split[i], begin, end); });
}

// Partial sums of groups are added in index order: nothing depends on threads or on the rest of the list.
void reduce(std::vector<Tensor> tensors, std::vector<Tensor> anchors, Tensor keys, std::vector<int64_t> tensor_ids,
            std::vector<int64_t> slices, std::string distribution, Tensor totals) {
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(totals, ScalarType::Double, "totals");
    STD_TORCH_CHECK(keys.numel() <= 1 && totals.numel() == int64_t(tensors.size()),
                    "keys, totals: accepted: one key or none, one total per tensor");
    if (tensors.empty()) return;
    const DType dtype = dtype_of(tensors[0], "tensors");
    std::vector<Piece> pieces = pieces_of(tensors, {}, tensor_ids, slices, dtype);
    attach(pieces, &Piece::first, anchors, dtype, false, "anchors");
    const uint64_t* const key = keys.numel() ? (const uint64_t*)keys.const_data_ptr() : nullptr;
    const ReducePass pass = {dtype, distribution_of(distribution), key};
    const std::vector<Piece> split = regrouped(pieces, dtype);
    std::vector<size_t> starts;
    size_t groups = 0;
    for (const Piece& p : split) starts.push_back(groups), groups += size_t(groups_of(p));
    std::vector<double> partials(groups, 0.0);
    for_each_group(split, [&](size_t i, int64_t begin, int64_t end) {
        double* to = partials.data() + starts[i] + size_t(begin - first_group(split[i]));
        kernels().reduce(pass, split[i], begin, end, to);
    });
    double* total = (double*)totals.mutable_data_ptr();
    std::fill(total, total + totals.numel(), 0.0);
    for (size_t i = 0; i < split.size(); ++i)
        for (int64_t g = 0; g < groups_of(split[i]); ++g) total[split[i].scalar] += partials[starts[i] + size_t(g)];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("masked(Tensor[] weights, Tensor(a!)[] out, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_key, str mask, Tensor mask_key, Tensor mask_level, Tensor[] mask_bits, int[] tensor_ids, "
          "int[] slices, str distribution) -> ()");
    m.def("preconditioned(Tensor[] weights, Tensor(a!)[] out, Tensor(b!)[] first, Tensor(c!)[] second, Tensor keys, "
          "Tensor gradient, Tensor restore, Tensor scalars, str rule, Tensor decay, Tensor? rounding_key, "
          "int[] tensor_ids, int[] slices, str distribution) -> ()");
    m.def("affine(Tensor[] weights, Tensor(a!)[] out, bool in_place, Tensor[] anchors, Tensor[] deltas, "
          "Tensor coefficient, Tensor? rounding_key, int[] tensor_ids, int[] slices) -> ()");
    m.def("reduce(Tensor[] tensors, Tensor[] anchors, Tensor keys, int[] tensor_ids, int[] slices, str distribution, "
          "Tensor(a!) totals) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("masked", TORCH_BOX(&masked));
    m.impl("preconditioned", TORCH_BOX(&preconditioned));
    m.impl("affine", TORCH_BOX(&affine));
    m.impl("reduce", TORCH_BOX(&reduce));
}
