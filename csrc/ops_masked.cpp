// The op of masked.inl: W <- round(W - decay W + delta), delta = sum_j a_j z(key_j) where a mask keeps an element.
#include "pieces.h"

namespace {

using namespace pgap;

// mask_level: the threshold of each tensor, or the word limit of all; mask_key: of a share; mask_bits: a bit per
// element.
void masked(std::vector<Tensor> weights, std::vector<Tensor> out, Tensor keys, Tensor coefficients, Tensor decay,
            std::optional<Tensor> rounding_key, std::string mask, Tensor mask_key, Tensor mask_level,
            std::vector<Tensor> mask_bits, std::vector<int64_t> tensor_ids, std::vector<int64_t> slices,
            std::string distribution) {
    if (out.empty()) return;
    const int64_t count = int64_t(out.size());
    check_cpu(keys, ScalarType::Long, "keys");
    const std::vector<float> a = broadcast_scalars(coefficients, keys.numel(), count, "coefficients");
    const std::vector<float> d = broadcast_scalars(decay, 1, count, "decay");
    const DType dtype = parse_dtype(out[0]);
    STD_TORCH_CHECK(!weights.empty(), "weights: accepted: lists of one length");
    std::vector<Piece> pieces = make_pieces(weights, out, tensor_ids, slices, dtype);
    MaskedPass pass = {.dtype = dtype,
                       .draws = parse_draws(distribution, keys, a, count),
                       .decay = d.data(),
                       .rounding_key = parse_rounding_keys(rounding_key)};
    std::vector<float> threshold(size_t(count), 0.0f);
    if (mask == "threshold") {
        pass.mask = Mask::threshold;
        threshold = broadcast_scalars(mask_level, 1, count, "mask_level");
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
            pieces[t].mask_bits = (const uint32_t*)mask_bits[t].const_data_ptr();
        }
    }
    pass.threshold = threshold.data();
    pieces = join_or_split_rows(pieces, dtype);
    parallel_for_groups(pieces, [&](size_t i, int64_t begin, int64_t end) {
        kernels().masked(pass, pieces[i], begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("masked(Tensor[] weights, Tensor(a!)[] out, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_key, str mask, Tensor mask_key, Tensor mask_level, Tensor[] mask_bits, int[] tensor_ids, "
          "int[] slices, str distribution) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("masked", TORCH_BOX(&masked)); }
