// The extension's ops on the LibTorch stable ABI: argument checks, work split over torch's own thread pool.
// The Python side has checked with better messages; what is checked here keeps memory safe whoever calls.
#include "pieces.h"

#include <cmath>
#include <cstring>

namespace {

using namespace pgap;

void dense(std::vector<Tensor> in, std::vector<Tensor> out, Tensor keys, Tensor coefficients, Tensor decay,
           std::optional<Tensor> rounding_keys, std::vector<int64_t> stages, std::vector<int64_t> tensor_ids,
           std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    const int64_t count = int64_t(out.size()), stage_count = int64_t(stages.size());
    int64_t draws = 0;
    for (int64_t n : stages) {
        STD_TORCH_CHECK(n >= 0, "stages: accepted: draws per stage");
        draws += n;
    }
    STD_TORCH_CHECK(draws == keys.numel(), "keys: accepted: one per draw of the stages");
    const std::vector<float> a = table_of(coefficients, draws, count, "coefficients");
    const std::vector<float> d = table_of(decay, stage_count, count, "decay");
    const DType dtype = dtype_of(out[0]);
    const DensePass pass = {
        dtype, {distribution_of(distribution), draws, count, (const uint64_t*)keys.const_data_ptr(), a.data()},
        stage_count, stages.data(), d.data(), rounding_keys_of(rounding_keys, stage_count)};
    const std::vector<Piece> pieces = regrouped(pieces_of(in, out, tensor_ids, slices, dtype), dtype);
    for_each_group(pieces, [&](size_t i, int64_t begin, int64_t end) { kernels().dense(pass, pieces[i], begin, end); });
}

// ---- low rank -------------------------------------------------------------------------------------------------

std::vector<float> to_float(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "factors: accepted: contiguous CPU tensors");
    std::vector<float> values(size_t(t.numel()));
    kernels().to_float(dtype_of(t, "factors"), t.const_data_ptr(), values.data(), t.numel());
    return values;
}

// Normals begin .. begin + count of a tensor id under a key.
std::vector<float> regenerate(int64_t begin, int64_t count, uint32_t tensor_id, uint64_t key) {
    std::vector<float> values(static_cast<size_t>(count));
    const float one = 1.0f, zero = 0.0f;
    const int64_t draws = 1;
    const DensePass pass = {DType::f32, {Distribution::normal, 1, 1, &key, &one}, 1, &draws, &zero, nullptr};
    Piece p = {};
    p.out = values.data(), p.rows = 1, p.cols = p.ld_in = p.ld_out = p.row_stride = count, p.base = begin;
    p.tensor_id = tensor_id;
    if (count) kernels().dense(pass, p, first_group(p), end_group(p));
    return values;
}

// B (columns x rank) -> panels of [rank][panel], zero-padded, so that one k reads consecutive columns.
std::vector<float> pack_right(const float* b, int64_t columns, int64_t rank, int64_t step_column, int64_t step_rank) {
    const int64_t panel = kernels().right_panel, panels = (columns + panel - 1) / panel;
    std::vector<float> packed(size_t(panels * panel * rank), 0.0f);
    for (int64_t j = 0; j < columns; ++j) {
        float* to = packed.data() + (j / panel) * panel * rank + j % panel;
        for (int64_t k = 0; k < rank; ++k) to[k * panel] = b[j * step_column + k * step_rank];
    }
    return packed;
}

// CPUs that multiply pairs of bf16 take subnormal numbers for zero. True where no number, product or sum here can be
// subnormal or overflow, so that pairs give the same bits as one product after the other.
bool fits_pairs(const std::vector<float>& a, const std::vector<float>& b, int64_t rank) {
    const auto range = [](const std::vector<float>& values) {
        double least = 1.0, most = 0.0;
        for (const float x : values) {
            const double size = std::fabs(x);
            if (!(size <= most)) most = size;  // NaN stays
            if (size != 0.0 && size < least) least = size;
        }
        return std::pair<double, double>(least, most);
    };
    const auto [least_a, most_a] = range(a);
    const auto [least_b, most_b] = range(b);
    return std::min(least_a, least_b) >= 0x1p-126 && least_a * least_b >= 0x1p-110 &&  // sums are multiples of 2^-126
           most_a * most_b * double(rank) <= 0x1p126;
}

// Rows of numbers that bf16 holds as rows of pairs; the last of an odd row has a zero.
std::vector<float> paired(const std::vector<float>& values, int64_t rank) {
    const int64_t depth = (rank + 1) / 2, rows = int64_t(values.size()) / rank;
    std::vector<float> pairs(size_t(rows * depth));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < depth; ++i) {
            const float* at = values.data() + row * rank + 2 * i;
            uint32_t high, low = 0;
            std::memcpy(&high, at, 4);
            if (2 * i + 1 < rank) std::memcpy(&low, at + 1, 4);
            high |= low >> 16;
            std::memcpy(&pairs[size_t(row * depth + i)], &high, 4);
        }
    return pairs;
}

struct LowRankWork { LowRankPass pass; std::vector<float> left, right; };

void low_rank(std::vector<Tensor> in, std::vector<Tensor> out, std::vector<Tensor> left, std::vector<Tensor> right,
              std::vector<Tensor> core, Tensor keys, Tensor coefficient, Tensor decay,
              std::optional<Tensor> rounding_key, std::vector<int64_t> tensor_ids, std::vector<int64_t> slices,
              int64_t rank, std::string core_kind) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(coefficient, ScalarType::Float, "coefficient");
    check_cpu(decay, ScalarType::Float, "decay");
    const uint64_t* const rounding = rounding_keys_of(rounding_key);
    const size_t count = out.size();
    const auto scalars = [&](const Tensor& t) { return t.numel() == 1 || t.numel() == int64_t(count); };
    STD_TORCH_CHECK(keys.numel() == 3 && scalars(coefficient) && scalars(decay) && rank > 0,
                    "keys, coefficient, decay, rank: accepted: 3 keys, scalars one or one per tensor, rank >= 1");
    STD_TORCH_CHECK((left.empty() || left.size() == count) && (right.empty() || right.size() == count) &&
                        (core.empty() || core.size() == count),
                    "left, right, core: accepted: empty (regenerated) or one per weight");
    const bool full = core_kind == "full", diagonal = core_kind == "diagonal";
    STD_TORCH_CHECK(full || diagonal || core_kind == "none" || core_kind == "regenerated",
                    "core_kind: accepted: none, diagonal, full, regenerated");
    STD_TORCH_CHECK((full || diagonal) == !core.empty(), "core: accepted: tensors for a diagonal or full core only");
    const DType dtype = dtype_of(out[0]);
    const std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    for (size_t t = 0; t < count; ++t) {
        const Piece& p = pieces[t];
        STD_TORCH_CHECK((left.empty() || left[t].numel() == p.rows * rank) &&
                            (right.empty() || right[t].numel() == p.cols * rank) &&
                            (core.empty() || core[t].numel() == (full ? rank * rank : rank)),
                        "left, right, core: accepted: (m, rank), (n, rank), (rank,) or (rank, rank)");
    }
    const uint64_t* key = (const uint64_t*)keys.const_data_ptr();
    const float* a = (const float*)coefficient.const_data_ptr();
    const float* d = (const float*)decay.const_data_ptr();
    const Kernels& k = kernels();

    const auto prepare = [&](size_t t) {
        const Piece& p = pieces[t];
        LowRankWork work;
        work.left = left.empty() ? regenerate(p.base / p.row_stride * rank, p.rows * rank, p.tensor_id, key[0])
                                 : to_float(left[t]);
        std::vector<float> b = right.empty()
            ? regenerate(p.base % p.row_stride * rank, p.cols * rank, p.tensor_id, key[1]) : to_float(right[t]);
        if (diagonal) {
            const std::vector<float> c = to_float(core[t]);
            for (int64_t i = 0; i < p.rows * rank; ++i) work.left[size_t(i)] *= c[size_t(i % rank)];
        } else if (core_kind != "none") {  // P = A C by the same kernel: C is already the packed side's transpose
            const std::vector<float> c = full ? to_float(core[t]) : regenerate(0, rank * rank, p.tensor_id, key[2]);
            const std::vector<float> packed = pack_right(c.data(), rank, rank, 1, rank);
            std::vector<float> product(work.left.size());
            Piece small = {};
            small.out = product.data(), small.rows = p.rows, small.cols = small.ld_out = small.row_stride = rank;
            const LowRankPass pass = {DType::f32, small, work.left.data(), packed.data(), rank, 1.0f, 0.0f, nullptr,
                                      false};
            k.low_rank(pass, 0, p.rows);
            work.left = std::move(product);
        }
        if (dtype != DType::f32) {
            k.round_to(dtype, work.left.data(), int64_t(work.left.size()));
            k.round_to(dtype, b.data(), int64_t(b.size()));
        }
        const bool pairs = k.pairs && dtype == DType::bf16 && fits_pairs(work.left, b, rank);
        const int64_t depth = pairs ? (rank + 1) / 2 : rank;
        if (pairs) work.left = paired(work.left, rank), b = paired(b, rank);
        work.right = pack_right(b.data(), p.cols, depth, depth, 1);
        work.pass = {dtype, p, nullptr, nullptr, rank, a[coefficient.numel() == 1 ? 0 : t],
                     d[decay.numel() == 1 ? 0 : t], rounding, pairs};
        return work;
    };

    // Batches of tensors share two parallel regions; the packed factors of a batch stay within some tens of MB.
    constexpr int64_t kBatchFloats = 8 << 20;
    for (size_t begin = 0; begin < count;) {
        size_t end = begin;
        for (int64_t floats = 0; end < count && (end == begin || floats < kBatchFloats); ++end)
            floats += (pieces[end].rows + pieces[end].cols) * rank;
        std::vector<LowRankWork> batch(end - begin);
        torch::stable::parallel_for(0, int64_t(batch.size()), 1, [&](int64_t i, int64_t stop) {
            for (; i < stop; ++i)
                if (pieces[begin + size_t(i)].rows * pieces[begin + size_t(i)].cols > 0)
                    batch[size_t(i)] = prepare(begin + size_t(i));
        });
        for (LowRankWork& w : batch) w.pass.left = w.left.data(), w.pass.right = w.right.data();
        constexpr int64_t kRows = 24;  // a multiple of every tile height
        for_each_run(
            batch.size(), 2,
            [&](size_t i) {
                const Piece& p = pieces[begin + i];
                return p.cols ? (p.rows + kRows - 1) / kRows : 0;
            },
            [&](size_t i, int64_t first, int64_t last) {
                k.low_rank(batch[i].pass, first * kRows, std::min(last * kRows, pieces[begin + i].rows));
            });
        begin = end;
    }
}

// ---- the transform alone, and what is running -------------------------------------------------------------------

void box_muller(Tensor a, Tensor b, Tensor even, Tensor odd) {
    check_cpu(a, ScalarType::Int, "a"), check_cpu(b, ScalarType::Int, "b");
    check_cpu(even, ScalarType::Float, "even"), check_cpu(odd, ScalarType::Float, "odd");
    const int64_t n = a.numel();
    STD_TORCH_CHECK(b.numel() == n && even.numel() == n && odd.numel() == n, "a, b, even, odd: accepted: one length");
    torch::stable::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
        kernels().box_muller((const uint32_t*)a.const_data_ptr() + begin, (const uint32_t*)b.const_data_ptr() + begin,
                             (float*)even.mutable_data_ptr() + begin, (float*)odd.mutable_data_ptr() + begin,
                             end - begin);
    });
}

std::string isa() { return std::string(kernels().name) + "," + best_isa(); }
void use_isa(std::string name) { use(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(pgap_kernels_cpu, m) {
    m.def("dense(Tensor[] weights, Tensor(a!)[] out, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_keys, int[] stages, int[] tensor_ids, int[] slices, str distribution) -> ()");
    m.def("low_rank(Tensor[] weights, Tensor(a!)[] out, Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, "
          "Tensor coefficient, Tensor decay, Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, "
          "str core_kind) -> ()");
    m.def("box_muller(Tensor a, Tensor b, Tensor(a!) even, Tensor(b!) odd) -> ()");
    m.def("isa() -> str");
    m.def("use_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("dense", TORCH_BOX(&dense));
    m.impl("low_rank", TORCH_BOX(&low_rank));
    m.impl("box_muller", TORCH_BOX(&box_muller));
    m.impl("isa", TORCH_BOX(&isa));
    m.impl("use_isa", TORCH_BOX(&use_isa));
}
