// The extension's ops on the LibTorch stable ABI: argument checks, work split over torch's own thread pool.
// The Python side has checked with better messages; what is checked here keeps memory safe whoever calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace pgap;

DType dtype_of(const Tensor& t, const char* name = "weights") {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        default: STD_TORCH_CHECK(false, name, ": accepted: float32, bfloat16, float16");
    }
}

int64_t itemsize(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void check_cpu(const Tensor& t, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name,
                    ": accepted: a contiguous CPU tensor of the op's scalar type");
}

struct Rows { int64_t rows, cols, ld; };

Rows rows_of(const Tensor& t) {
    const int64_t dim = t.dim(), numel = t.numel();
    if (dim < 2) {
        STD_TORCH_CHECK(numel < 2 || t.stride(0) == 1, "weights: accepted: contiguous rows");
        return {1, numel, numel};
    }
    int64_t cols = 1;
    for (int64_t i = dim - 1; i > 0; --i) {
        STD_TORCH_CHECK(numel == 0 || t.size(i) == 1 || t.stride(i) == cols, "weights: accepted: contiguous rows");
        cols *= t.size(i);
    }
    const int64_t rows = t.size(0), ld = numel > 0 && rows > 1 ? t.stride(0) : cols;
    STD_TORCH_CHECK(ld >= cols, "weights: accepted: rows that do not overlap");
    return {rows, cols, ld};
}

// Checked list of tensors as pieces; `in` may be empty (nothing is read).
std::vector<Piece> pieces_of(const std::vector<Tensor>& in, const std::vector<Tensor>& out,
                             const std::vector<int64_t>& tensor_ids, const std::vector<int64_t>& slices, DType dtype) {
    const size_t count = out.size();
    STD_TORCH_CHECK((in.empty() || in.size() == count) && tensor_ids.size() == count && slices.size() == 2 * count,
                    "weights, out, tensor_ids, slices: accepted: lists of one length");
    std::vector<Piece> pieces;
    pieces.reserve(count);
    for (size_t t = 0; t < count; ++t) {
        STD_TORCH_CHECK(out[t].is_cpu() && dtype_of(out[t]) == dtype, "out: accepted: CPU tensors of one dtype");
        const Rows o = rows_of(out[t]);
        Piece p = {nullptr, out[t].mutable_data_ptr(), o.rows, o.cols, o.ld, o.ld,
                   slices[2 * t], slices[2 * t + 1], uint32_t(tensor_ids[t]), int64_t(t)};
        if (!in.empty()) {
            STD_TORCH_CHECK(in[t].is_cpu() && dtype_of(in[t]) == dtype, "weights: accepted: CPU tensors of one dtype");
            const Rows w = rows_of(in[t]);
            STD_TORCH_CHECK(w.rows == o.rows && w.cols == o.cols, "out: accepted: the shapes of weights");
            p.in = in[t].const_data_ptr();
            p.ld_in = w.ld;
        }
        STD_TORCH_CHECK(tensor_ids[t] >= 0 && tensor_ids[t] <= int64_t(UINT32_MAX), "tensor_ids: accepted: 32 bits");
        int64_t last = 0;  // one past the last logical index
        STD_TORCH_CHECK(p.base >= 0 && p.row_stride >= std::max<int64_t>(p.cols, 1) &&
                            !__builtin_mul_overflow(std::max<int64_t>(p.rows - 1, 0), p.row_stride, &last) &&
                            !__builtin_add_overflow(last, p.base, &last) &&
                            !__builtin_add_overflow(last, p.cols, &last),
                        "slices: accepted: base >= 0, row_stride >= columns, indices below 2**63");
        pieces.push_back(p);
    }
    return pieces;
}

// Rows that follow each other in memory and in the index become one; rows far apart in the index become pieces of
// their own, so that no pass walks over groups that hold nothing.
std::vector<Piece> regrouped(const std::vector<Piece>& pieces, DType dtype) {
    std::vector<Piece> result;
    result.reserve(pieces.size());
    for (Piece p : pieces) {
        if (p.rows * p.cols == 0) continue;
        if (p.ld_in == p.cols && p.ld_out == p.cols && p.row_stride == p.cols) {
            p.cols *= p.rows, p.rows = 1, p.row_stride = p.ld_in = p.ld_out = p.cols;
        }
        if (p.rows == 1) p.row_stride = p.cols;
        if (p.rows == 1 || p.row_stride <= p.cols + 4096) {
            result.push_back(p);
            continue;
        }
        for (int64_t row = 0; row < p.rows; ++row) {
            Piece one = p;
            one.rows = 1, one.row_stride = p.cols, one.base = p.base + row * p.row_stride;
            one.out = (char*)p.out + row * p.ld_out * itemsize(dtype);
            if (p.in) one.in = (const char*)p.in + row * p.ld_in * itemsize(dtype);
            result.push_back(one);
        }
    }
    return result;
}

// One parallel region over the items of all pieces; f(piece, begin, end) gets runs of one piece's items.
template <class Count, class F> void for_each_run(size_t pieces, int64_t grain, Count count, F f) {
    std::vector<int64_t> ends(pieces);
    int64_t total = 0;
    for (size_t i = 0; i < pieces; ++i) ends[i] = total += count(i);
    if (total == 0) return;
    torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
        size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
        for (; begin < end; ++i) {
            const int64_t start = i ? ends[i - 1] : 0, stop = std::min(end, ends[i]);
            if (stop > begin) f(i, begin - start, stop - start);
            begin = stop;
        }
    });
}

void run_dense(const DensePass& pass, const std::vector<Piece>& pieces) {
    constexpr int64_t kGrain = 8;  // groups; 32768 weights, some tens of microseconds
    const Kernels& k = kernels();
    for_each_run(
        pieces.size(), kGrain, [&](size_t i) { return end_group(pieces[i]) - first_group(pieces[i]); },
        [&](size_t i, int64_t begin, int64_t end) {
            const int64_t first = first_group(pieces[i]);
            k.dense(pass, pieces[i], first + begin, first + end);
        });
}

Distribution distribution_of(const std::string& name) {
    STD_TORCH_CHECK(name == "normal" || name == "rademacher", "distribution: accepted: normal, rademacher");
    return name == "normal" ? Distribution::normal : Distribution::rademacher;
}

void dense(std::vector<Tensor> in, std::vector<Tensor> out, Tensor keys, Tensor coefficients, Tensor decay,
           std::optional<Tensor> rounding_keys, std::vector<int64_t> stages, std::vector<int64_t> tensor_ids,
           std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(coefficients, ScalarType::Float, "coefficients");
    check_cpu(decay, ScalarType::Float, "decay");
    const int64_t count = int64_t(out.size());
    const auto is_table = [&](const Tensor& t) { return t.dim() == 2 && (t.size(1) == 1 || t.size(1) == count); };
    STD_TORCH_CHECK(is_table(coefficients) && is_table(decay), "coefficients, decay: accepted: tables of one column, or "
                    "one per tensor");
    const int64_t columns = std::max(coefficients.size(1), decay.size(1));
    int64_t draws = 0;
    for (int64_t n : stages) {
        STD_TORCH_CHECK(n >= 0, "stages: accepted: draws per stage");
        draws += n;
    }
    STD_TORCH_CHECK(draws == keys.numel() && draws == coefficients.size(0) && decay.size(0) == int64_t(stages.size()),
                    "draws: accepted: one key and coefficient each, one decay per stage");
    if (rounding_keys) {
        check_cpu(*rounding_keys, ScalarType::Long, "rounding_keys");
        STD_TORCH_CHECK(rounding_keys->numel() == int64_t(stages.size()), "rounding_keys: accepted: one per stage");
    }
    // Both tables get the same number of columns.
    const auto widened = [&](const Tensor& t) {
        const float* p = (const float*)t.const_data_ptr();
        std::vector<float> table;
        for (int64_t i = 0; i < t.size(0); ++i)
            for (int64_t c = 0; c < columns; ++c) table.push_back(p[t.size(1) == 1 ? i : i * columns + c]);
        return table;
    };
    const std::vector<float> a = widened(coefficients), d = widened(decay);
    const DType dtype = dtype_of(out[0]);
    const DensePass pass = {dtype, distribution_of(distribution), int64_t(stages.size()), columns, stages.data(),
                            (const uint64_t*)keys.const_data_ptr(), a.data(), d.data(),
                            rounding_keys ? (const uint64_t*)rounding_keys->const_data_ptr() : nullptr};
    std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    if (columns == 1)
        for (Piece& p : pieces) p.scalar = 0;
    run_dense(pass, regrouped(pieces, dtype));
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
    const DensePass pass = {DType::f32, Distribution::normal, 1, 1, &draws, &key, &one, &zero, nullptr};
    const Piece p = {nullptr, values.data(), 1, count, count, count, begin, count, tensor_id, 0};
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

struct LowRankWork { LowRankPass pass; std::vector<float> left, right; };

void low_rank(std::vector<Tensor> in, std::vector<Tensor> out, std::vector<Tensor> left, std::vector<Tensor> right,
              std::vector<Tensor> core, Tensor keys, Tensor coefficient, Tensor decay,
              std::optional<Tensor> rounding_key, std::vector<int64_t> tensor_ids, std::vector<int64_t> slices,
              int64_t rank, std::string core_kind) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(coefficient, ScalarType::Float, "coefficient");
    check_cpu(decay, ScalarType::Float, "decay");
    if (rounding_key) check_cpu(*rounding_key, ScalarType::Long, "rounding_key");
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
            const LowRankPass pass = {DType::f32, {nullptr, product.data(), p.rows, rank, rank, rank, 0, rank, 0, 0},
                                      work.left.data(), packed.data(), rank, 1.0f, 0.0f, nullptr};
            k.low_rank(pass, 0, p.rows);
            work.left = std::move(product);
        }
        if (dtype != DType::f32) {
            k.round_to(dtype, work.left.data(), int64_t(work.left.size()));
            k.round_to(dtype, b.data(), int64_t(b.size()));
        }
        work.right = pack_right(b.data(), p.cols, rank, rank, 1);
        work.pass = {dtype, p, nullptr, nullptr, rank, a[coefficient.numel() == 1 ? 0 : t],
                     d[decay.numel() == 1 ? 0 : t],
                     rounding_key ? (const uint64_t*)rounding_key->const_data_ptr() : nullptr};
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

}  // namespace

STABLE_TORCH_LIBRARY(pgap_kernels_cpu, m) {
    m.def("dense(Tensor[] weights, Tensor(a!)[] out, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_keys, int[] stages, int[] tensor_ids, int[] slices, str distribution) -> ()");
    m.def("low_rank(Tensor[] weights, Tensor(a!)[] out, Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, "
          "Tensor coefficient, Tensor decay, Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, "
          "str core_kind) -> ()");
    m.def("box_muller(Tensor a, Tensor b, Tensor(a!) even, Tensor(b!) odd) -> ()");
    m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("dense", TORCH_BOX(&dense));
    m.impl("low_rank", TORCH_BOX(&low_rank));
    m.impl("box_muller", TORCH_BOX(&box_muller));
    m.impl("isa", TORCH_BOX(&isa));
}
