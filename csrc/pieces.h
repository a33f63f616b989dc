// Lists of tensors as the pieces that kernels take: the checks that keep memory safe, and the split over threads.
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

inline DType dtype_of(const Tensor& t, const char* name = "weights") {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        default: STD_TORCH_CHECK(false, name, ": accepted: float32, bfloat16, float16");
    }
}

inline int64_t itemsize(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline void check_cpu(const Tensor& t, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name,
                    ": accepted: a contiguous CPU tensor of the op's scalar type");
}

inline Distribution distribution_of(const std::string& name) {
    STD_TORCH_CHECK(name == "normal" || name == "rademacher", "distribution: accepted: normal, rademacher");
    return name == "normal" ? Distribution::normal : Distribution::rademacher;
}

// The key of stochastic rounding, or of each of several stages; null without.
inline const uint64_t* rounding_keys_of(const std::optional<Tensor>& keys, int64_t count = 1) {
    if (!keys) return nullptr;
    check_cpu(*keys, ScalarType::Long, "rounding_keys");
    STD_TORCH_CHECK(keys->numel() == count, "rounding_keys: accepted: one per stage");
    return (const uint64_t*)keys->const_data_ptr();
}

// A table of scalars of one column, or one per tensor, with one per tensor.
inline std::vector<float> table_of(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
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

struct Rows { int64_t rows, cols, ld; };

// None if the rows are not contiguous, or overlap. Reading may repeat one row: a vector expanded over rows (stride 0).
inline std::optional<Rows> find_rows(const Tensor& t, bool written = true) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t dim = t.dim(), numel = t.numel();
    if (dim < 2) {
        if (numel > 1 && strides[0] != 1) return std::nullopt;
        return Rows{1, numel, numel};
    }
    int64_t cols = 1;
    for (int64_t i = dim - 1; i > 0; --i) {
        if (numel > 0 && sizes[i] != 1 && strides[i] != cols) return std::nullopt;
        cols *= sizes[i];
    }
    const int64_t ld = numel > 0 && sizes[0] > 1 ? strides[0] : cols;
    if (ld < cols && (written || ld != 0)) return std::nullopt;
    return Rows{sizes[0], cols, ld};
}

inline Rows rows_of(const Tensor& t, bool written, const char* name = "weights") {
    const std::optional<Rows> rows = find_rows(t, written);
    STD_TORCH_CHECK(rows, name, ": accepted: contiguous rows that do not overlap");
    return *rows;
}

// Checked list of tensors as pieces; without `in` nothing is read, without `out` nothing written, and without `slices`
// all are whole.
inline std::vector<Piece> pieces_of(const std::vector<Tensor>& in, const std::vector<Tensor>& out,
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
        const Rows shape = rows_of(shapes[t], !out.empty());
        Piece p = {};
        p.rows = shape.rows, p.cols = shape.cols, p.ld_in = p.ld_out = shape.ld;
        p.base = slices.empty() ? 0 : slices[2 * t];
        p.row_stride = slices.empty() ? std::max<int64_t>(p.cols, 1) : slices[2 * t + 1];
        p.tensor_id = uint32_t(tensor_ids[t]), p.scalar = int64_t(t);
        if (!out.empty()) {
            STD_TORCH_CHECK(out[t].is_cpu() && dtype_of(out[t]) == dtype, "out: accepted: CPU tensors of one dtype");
            p.out = out[t].mutable_data_ptr();
        }
        if (!in.empty()) {
            STD_TORCH_CHECK(in[t].is_cpu() && dtype_of(in[t]) == dtype, "weights: accepted: CPU tensors of one dtype");
            const Rows w = rows_of(in[t], false);
            STD_TORCH_CHECK(w.rows == p.rows && w.cols == p.cols, "out: accepted: the shapes of weights");
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

// Gives every piece its tensor of a list beside the weights, float32 or `other`; an empty list gives none.
inline void attach(std::vector<Piece>& pieces, Companion Piece::*which, const std::vector<Tensor>& tensors,
                   DType other, bool written, const char* name) {
    if (tensors.empty()) return;
    STD_TORCH_CHECK(tensors.size() == pieces.size(), name, ": accepted: one tensor per weight");
    for (size_t t = 0; t < pieces.size(); ++t) {
        const Tensor& tensor = tensors[t];
        const DType own = dtype_of(tensor, name);
        STD_TORCH_CHECK(tensor.is_cpu() && (own == DType::f32 || own == other), name,
                        ": accepted: CPU tensors of float32 or, for anchors, of the weights' dtype");
        const Rows shape = rows_of(tensor, written, name);
        STD_TORCH_CHECK(shape.rows == pieces[t].rows && shape.cols == pieces[t].cols, name,
                        ": accepted: the shapes of weights");
        void* data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
        pieces[t].*which = {data, shape.ld, own};
    }
}

// Rows that follow each other in memory and in the index become one; rows far apart in the index become pieces of
// their own, so that no pass walks over groups that hold nothing. No two pieces of a tensor then share a group.
inline std::vector<Piece> regrouped(const std::vector<Piece>& pieces, DType dtype) {
    const auto dense = [](const Companion& c, int64_t cols) { return !c.data || c.ld == cols; };
    const auto advance = [](Companion& c, int64_t row) {
        if (c.data) c.data = (char*)c.data + row * c.ld * itemsize(c.dtype);
    };
    std::vector<Piece> result;
    result.reserve(pieces.size());
    for (Piece p : pieces) {
        if (p.rows * p.cols == 0) continue;
        if (p.ld_in == p.cols && p.ld_out == p.cols && p.row_stride == p.cols && dense(p.first, p.cols) &&
            dense(p.second, p.cols)) {
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
            one.element = p.element + row * p.cols;
            if (p.out) one.out = (char*)p.out + row * p.ld_out * itemsize(dtype);
            if (p.in) one.in = (const char*)p.in + row * p.ld_in * itemsize(dtype);
            advance(one.first, row), advance(one.second, row);
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

inline int64_t groups_of(const Piece& p) { return end_group(p) - first_group(p); }

// f(piece, group_begin, group_end) over the groups of regrouped pieces.
template <class F> void for_each_group(const std::vector<Piece>& pieces, F f) {
    constexpr int64_t kGrain = 8;  // groups; 32768 weights, some tens of microseconds
    for_each_run(
        pieces.size(), kGrain, [&](size_t i) { return groups_of(pieces[i]); },
        [&](size_t i, int64_t begin, int64_t end) {
            const int64_t first = first_group(pieces[i]);
            f(i, first + begin, first + end);
        });
}

}  // namespace pgap
