// The op of dense.inl: W <- round(W - decay W + sum_j a_j z(key_j)), once per stage.
#include "pieces.h"

namespace {

using namespace pgap;

// With neither in_place nor weights, out receives the sum of draws itself.
void dense(std::vector<Tensor> weights, std::vector<Tensor> out, bool in_place, Tensor keys, Tensor coefficients,
           Tensor decay, std::optional<Tensor> rounding_keys, std::vector<int64_t> stages,
           std::vector<int64_t> tensor_ids, std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    const int64_t count = int64_t(out.size()), stage_count = int64_t(stages.size());
    int64_t draws = 0;
    for (int64_t n : stages) {
        STD_TORCH_CHECK(n >= 0, "stages: accepted: draws per stage");
        draws += n;
    }
    STD_TORCH_CHECK(draws == keys.numel(), "keys: accepted: one per draw of the stages");
    const std::vector<float> a = broadcast_scalars(coefficients, draws, count, "coefficients");
    const std::vector<float> d = broadcast_scalars(decay, stage_count, count, "decay");
    const DType dtype = parse_dtype(out[0]);
    const DensePass pass = {.dtype = dtype,
                            .draws = parse_draws(distribution, keys, a, count),
                            .stages = stage_count,
                            .draws_per_stage = stages.data(),
                            .decay = d.data(),
                            .rounding_keys = parse_rounding_keys(rounding_keys, stage_count)};
    std::vector<Piece> pieces = make_pieces(weights, out, tensor_ids, slices, dtype);
    constexpr int64_t kLarge = 32 << 20;  // bytes; a smaller output may still be in a cache when it is read
    if (in_place) read_in_place(pieces);
    else for (Piece& p : pieces) p.stream = p.rows * p.cols * itemsize(dtype) > kLarge;
    pieces = join_or_split_rows(pieces, dtype);
    parallel_for_groups(pieces, [&](size_t i, int64_t begin, int64_t end) {
        kernels().dense(pass, pieces[i], begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("dense(Tensor[] weights, Tensor(a!)[] out, bool in_place, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_keys, int[] stages, int[] tensor_ids, int[] slices, str distribution) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("dense", TORCH_BOX(&dense)); }
