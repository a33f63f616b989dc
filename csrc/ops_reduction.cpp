// The op of reduction.inl: of each tensor sum x z(key), or sum x x without a key; x = T, or T - T0 with an anchor.
#include "pieces.h"

namespace {

using namespace pgap;

// Threads write a partial sum per group. Their sum in index order depends neither on threads nor on the rest of the
// list.
void reduction(std::vector<Tensor> tensors, std::vector<Tensor> anchors, Tensor keys, std::vector<int64_t> tensor_ids,
               std::vector<int64_t> slices, std::string distribution, Tensor totals) {
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(totals, ScalarType::Double, "totals");
    STD_TORCH_CHECK(keys.numel() <= 1 && totals.numel() == int64_t(tensors.size()),
                    "keys, totals: accepted: one key or none, one total per tensor");
    if (tensors.empty()) return;
    const DType dtype = parse_dtype(tensors[0], "tensors");
    std::vector<Piece> pieces = make_pieces(tensors, {}, tensor_ids, slices, dtype);
    attach_companions(pieces, &Piece::anchor, anchors, dtype, false, "anchors");
    const ReductionPass pass = {.dtype = dtype,
                                .distribution = parse_distribution(distribution),
                                .key = keys.numel() ? (const uint64_t*)keys.const_data_ptr() : nullptr};
    pieces = join_or_split_rows(pieces, dtype);
    std::vector<size_t> starts;  // of every piece's partial sums
    size_t groups = 0;
    for (const Piece& p : pieces) {
        starts.push_back(groups);
        groups += size_t(group_count(p));
    }
    std::vector<double> partials(groups, 0.0);
    parallel_for_groups(pieces, [&](size_t i, int64_t begin, int64_t end) {
        double* to = partials.data() + starts[i] + size_t(begin - first_group(pieces[i]));
        kernels().reduction(pass, pieces[i], begin, end, to);
    });
    double* total = (double*)totals.mutable_data_ptr();
    std::fill(total, total + totals.numel(), 0.0);
    for (size_t i = 0; i < pieces.size(); ++i)
        for (int64_t g = 0; g < group_count(pieces[i]); ++g)
            total[pieces[i].column] += partials[starts[i] + size_t(g)];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("reduction(Tensor[] tensors, Tensor[] anchors, Tensor keys, int[] tensor_ids, int[] slices, "
          "str distribution, Tensor(a!) totals) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("reduction", TORCH_BOX(&reduction));
}
