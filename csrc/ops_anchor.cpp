// The op of anchor.inl: W <- round(fma(c, X, W0)), X = Delta where given, else W - W0.
#include "pieces.h"

namespace {

using namespace pgap;

// Out of place, weights are needed only without deltas.
void anchor(std::vector<Tensor> weights, std::vector<Tensor> out, bool in_place, std::vector<Tensor> anchors,
            std::vector<Tensor> deltas, Tensor coefficient, std::optional<Tensor> rounding_key,
            std::vector<int64_t> tensor_ids, std::vector<int64_t> slices) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    const std::vector<float> c = broadcast_scalars(coefficient, 1, count, "coefficient");
    const DType dtype = parse_dtype(out[0]);
    STD_TORCH_CHECK(!anchors.empty(), "anchors: accepted: one tensor per weight");
    STD_TORCH_CHECK(in_place || !weights.empty() || !deltas.empty(),
                    "weights: accepted: one per output, without deltas");
    std::vector<Piece> pieces = make_pieces(weights, out, tensor_ids, slices, dtype);
    if (in_place) read_in_place(pieces);
    attach_companions(pieces, &Piece::anchor, anchors, dtype, false, "anchors");
    attach_companions(pieces, &Piece::delta, deltas, dtype, false, "deltas");
    const AnchorPass pass = {
        .dtype = dtype, .coefficient = c.data(), .rounding_key = parse_rounding_keys(rounding_key)};
    pieces = join_or_split_rows(pieces, dtype);
    parallel_for_groups(pieces, [&](size_t i, int64_t begin, int64_t end) {
        kernels().anchor(pass, pieces[i], begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("anchor(Tensor[] weights, Tensor(a!)[] out, bool in_place, Tensor[] anchors, Tensor[] deltas, "
          "Tensor coefficient, Tensor? rounding_key, int[] tensor_ids, int[] slices) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("anchor", TORCH_BOX(&anchor)); }
