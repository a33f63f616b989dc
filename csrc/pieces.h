// Turns lists of tensors into the pieces that kernels take: the checks that keep memory safe, and the split over
// threads. Python checks the same arguments first, with better messages; these checks ensure that no caller of the
// extension can make it read or write outside its tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace pgap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- single arguments -------------------------------------------------------------------------------------------

inline int64_t itemsize(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline std::optional<DType> try_parse_dtype(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        default: return std::nullopt;
    }
}

inline DType parse_dtype(const Tensor& t, const char* name = "weights") {
    const std::optional<DType> dtype = try_parse_dtype(t);
    STD_TORCH_CHECK(dtype, name, ": accepted: float32, bfloat16, float16");
    return *dtype;
}

inline Distribution parse_distribution(const std::string& name) {
    STD_TORCH_CHECK(name == "normal" || name == "rademacher", "distribution: accepted: normal, rademacher");
    return name == "normal" ? Distribution::normal : Distribution::rademacher;
}

inline void check_cpu(const Tensor& t, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name,
                    ": accepted: a contiguous CPU tensor of the op's scalar type");
}

// The table of coefficients is one of broadcast_scalars(), which outlives the draws.
inline Draws parse_draws(const std::string& distribution, const Tensor& keys, const std::vector<float>& coefficients,
                         int64_t columns) {
    return {.distribution = parse_distribution(distribution),
            .count = keys.numel(),
            .columns = columns,
            .keys = (const uint64_t*)keys.const_data_ptr(),
            .coefficients = coefficients.data()};
}

// The keys of stochastic rounding, one per stage; null without.
inline const uint64_t* parse_rounding_keys(const std::optional<Tensor>& keys, int64_t count = 1) {
    if (!keys) return nullptr;
    check_cpu(*keys, ScalarType::Long, "rounding_keys");
    STD_TORCH_CHECK(keys->numel() == count, "rounding_keys: accepted: one per stage");
    return (const uint64_t*)keys->const_data_ptr();
}

// A table of scalars with a column per tensor; one of a single column is repeated for all of them.
inline std::vector<float> broadcast_scalars(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
    check_cpu(t, ScalarType::Float, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && (t.size(1) == 1 || t.size(1) == columns), name,
                    ": accepted: tables of one column, or one per tensor, and one row per draw, stage or scalar");
    const float* p = (const float*)t.const_data_ptr();
    std::vector<float> table;
    table.reserve(size_t(rows * columns));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c) table.push_back(p[t.size(1) == 1 ? i : i * columns + c]);
    return table;
}

// ---- layout -----------------------------------------------------------------------------------------------------

struct Layout { int64_t rows, cols, ld; };

// A tensor as a matrix: dimension 0 by all others; one of less than two dimensions is a row. None if rows are not
// contiguous, or overlap. A tensor that is not written may repeat one row: a vector expanded over rows has a row
// stride of 0.
inline std::optional<Layout> try_parse_layout(const Tensor& t, bool written = true) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t dim = t.dim(), numel = t.numel();
    if (dim < 2) {
        if (numel > 1 && strides[0] != 1) return std::nullopt;
        return Layout{.rows = 1, .cols = numel, .ld = numel};
    }
    int64_t cols = 1;
    for (int64_t i = dim - 1; i > 0; --i) {
        if (numel > 0 && sizes[i] != 1 && strides[i] != cols) return std::nullopt;
        cols *= sizes[i];
    }
    const int64_t ld = numel > 0 && sizes[0] > 1 ? strides[0] : cols;
    if (ld < cols && (written || ld != 0)) return std::nullopt;
    return Layout{.rows = sizes[0], .cols = cols, .ld = ld};
}

inline Layout parse_layout(const Tensor& t, bool written, const char* name = "weights") {
    const std::optional<Layout> layout = try_parse_layout(t, written);
    STD_TORCH_CHECK(layout, name, ": accepted: contiguous rows that do not overlap");
    return *layout;
}

// ---- lists of tensors -------------------------------------------------------------------------------------------

// A piece per tensor. Without `in` nothing is read, without `out` nothing is written, and without `slices` (base and
// row stride of each) all tensors are whole.
inline std::vector<Piece> make_pieces(const std::vector<Tensor>& in, const std::vector<Tensor>& out,
                                      const std::vector<int64_t>& tensor_ids, const std::vector<int64_t>& slices,
                                      DType dtype) {
    const std::vector<Tensor>& shapes = out.empty() ? in : out;
    const size_t count = shapes.size();
    STD_TORCH_CHECK((in.empty() || in.size() == count) && tensor_ids.size() == count &&
                        (slices.empty() || slices.size() == 2 * count),
                    "weights, out, tensor_ids, slices: accepted: lists of one length");
    std::vector<Piece> pieces;
    pieces.reserve(count);
    for (size_t t = 0; t < count; ++t) {
        STD_TORCH_CHECK(tensor_ids[t] >= 0 && tensor_ids[t] <= int64_t(UINT32_MAX), "tensor_ids: accepted: 32 bits");
        const Layout layout = parse_layout(shapes[t], !out.empty());
        Piece p = {.rows = layout.rows,
                   .cols = layout.cols,
                   .ld_in = layout.ld,
                   .ld_out = layout.ld,
                   .base = slices.empty() ? 0 : slices[2 * t],
                   .row_stride = slices.empty() ? std::max<int64_t>(layout.cols, 1) : slices[2 * t + 1],
                   .tensor_id = uint32_t(tensor_ids[t]),
                   .column = int64_t(t)};
        if (!out.empty()) {
            STD_TORCH_CHECK(out[t].is_cpu() && parse_dtype(out[t]) == dtype, "out: accepted: CPU tensors of one dtype");
            p.out = out[t].mutable_data_ptr();
        }
        if (!in.empty()) {
            STD_TORCH_CHECK(in[t].is_cpu() && parse_dtype(in[t]) == dtype,
                            "weights: accepted: CPU tensors of one dtype");
            const Layout read = parse_layout(in[t], false);
            STD_TORCH_CHECK(read.rows == p.rows && read.cols == p.cols, "out: accepted: the shapes of weights");
            p.in = in[t].const_data_ptr();
            p.ld_in = read.ld;
        }
        int64_t end = 0;  // one past the last logical index
        STD_TORCH_CHECK(p.base >= 0 && p.row_stride >= std::max<int64_t>(p.cols, 1) &&
                            !__builtin_mul_overflow(std::max<int64_t>(p.rows - 1, 0), p.row_stride, &end) &&
                            !__builtin_add_overflow(end, p.base, &end) && !__builtin_add_overflow(end, p.cols, &end),
                        "slices: accepted: base >= 0, row_stride >= columns, indices below 2**63");
        pieces.push_back(p);
    }
    return pieces;
}

// Makes a pass read what it writes. Ops that are called in place get no list of weights: handing over the same tensors
// twice would double the cost of a call.
inline void read_in_place(std::vector<Piece>& pieces) {
    for (Piece& p : pieces) {
        p.in = p.out;
        p.ld_in = p.ld_out;
    }
}

// Gives every piece its tensor of another list, float32 or `other_dtype`; an empty list gives none.
inline void attach_companions(std::vector<Piece>& pieces, Companion Piece::*field, const std::vector<Tensor>& tensors,
                              DType other_dtype, bool written, const char* name) {
    if (tensors.empty()) return;
    STD_TORCH_CHECK(tensors.size() == pieces.size(), name, ": accepted: one tensor per weight");
    for (size_t t = 0; t < pieces.size(); ++t) {
        const Tensor& tensor = tensors[t];
        const DType dtype = parse_dtype(tensor, name);
        STD_TORCH_CHECK(tensor.is_cpu() && (dtype == DType::f32 || dtype == other_dtype), name,
                        ": accepted: CPU tensors of float32 or, for anchors, of the weights' dtype");
        const Layout layout = parse_layout(tensor, written, name);
        STD_TORCH_CHECK(layout.rows == pieces[t].rows && layout.cols == pieces[t].cols, name,
                        ": accepted: the shapes of weights");
        void* data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
        pieces[t].*field = {.data = data, .ld = layout.ld, .dtype = dtype};
    }
}

// ---- work -------------------------------------------------------------------------------------------------------

// Prepares pieces for a pass over groups. Rows that are adjacent in memory and in the index are joined into one, which
// is faster; rows far apart in the index become separate pieces, so that no pass walks over empty groups. No two
// pieces of a tensor share a group.
inline std::vector<Piece> join_or_split_rows(const std::vector<Piece>& pieces, DType dtype) {
    constexpr Companion Piece::*kCompanions[] = {&Piece::state0, &Piece::state1, &Piece::anchor, &Piece::delta};
    const auto contiguous = [&](const Piece& p) {
        bool all = p.ld_in == p.cols && p.ld_out == p.cols && p.row_stride == p.cols;
        for (const auto field : kCompanions) all &= !(p.*field).data || (p.*field).ld == p.cols;
        return all;
    };
    std::vector<Piece> result;
    result.reserve(pieces.size());
    for (Piece p : pieces) {
        if (p.rows * p.cols == 0) continue;
        if (contiguous(p)) {
            p.cols *= p.rows;
            p.rows = 1;
            p.ld_in = p.ld_out = p.cols;
        }
        if (p.rows == 1) p.row_stride = p.cols;
        if (p.rows == 1 || p.row_stride <= p.cols + 4096) {
            result.push_back(p);
            continue;
        }
        for (int64_t row = 0; row < p.rows; ++row) {
            Piece one = p;
            one.rows = 1;
            one.row_stride = p.cols;
            one.base = p.base + row * p.row_stride;
            one.mask_offset = p.mask_offset + row * p.cols;
            if (p.in) one.in = (const char*)p.in + row * p.ld_in * itemsize(dtype);
            if (p.out) one.out = (char*)p.out + row * p.ld_out * itemsize(dtype);
            for (const auto field : kCompanions) {
                Companion& c = one.*field;
                if (c.data) c.data = (char*)c.data + row * c.ld * itemsize(c.dtype);
            }
            result.push_back(one);
        }
    }
    return result;
}

// One parallel region over count(0) + count(1) + .. items of several owners; f(owner, begin, end) gets items of one
// owner. One region for a whole list, because a region per tensor would cost more than a small tensor's work.
template <class Count, class F> void parallel_for_items(size_t owners, int64_t grain, Count count, F f) {
    std::vector<int64_t> ends(owners);
    int64_t total = 0;
    for (size_t i = 0; i < owners; ++i) ends[i] = total += count(i);
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

inline int64_t group_count(const Piece& p) { return end_group(p) - first_group(p); }

// f(index of a piece, group_begin, group_end) over the groups of pieces from join_or_split_rows().
template <class F> void parallel_for_groups(const std::vector<Piece>& pieces, F f) {
    constexpr int64_t kGrain = 8;  // groups: 32768 weights, some tens of microseconds
    parallel_for_items(
        pieces.size(), kGrain, [&](size_t i) { return group_count(pieces[i]); },
        [&](size_t i, int64_t begin, int64_t end) {
            const int64_t first = first_group(pieces[i]);
            f(i, first + begin, first + end);
        });
}

}  // namespace pgap
