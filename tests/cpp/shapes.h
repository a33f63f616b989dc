// Pieces and scalars for the passes over groups: dense, masked, preconditioned, anchor, reduction.
#pragma once
#include <string>
#include <vector>

#include "run.h"

namespace pgap {

struct Shape { int64_t rows, cols, gap, base, row_stride; };
constexpr Shape kShapes[] = {
    {.rows = 1, .cols = 1, .row_stride = 1},
    {.rows = 1, .cols = 31, .base = 5, .row_stride = 31},
    {.rows = 1, .cols = 4096, .base = 8192, .row_stride = 4096},                      // one whole group
    {.rows = 1, .cols = 8200, .base = 4090, .row_stride = 8200},                      // begins and ends within groups
    {.rows = 3, .cols = 1025, .gap = 3, .base = 1000, .row_stride = 1025},            // gaps in memory alone
    {.rows = 23, .cols = 129, .gap = 2, .base = 2147483641, .row_stride = 131},       // a shard, across 2^31
    {.rows = 5, .cols = 7, .gap = 1, .base = 8589934609, .row_stride = 4096},         // a short run in every group
    {.rows = 4, .cols = 33, .base = 4503599627370495, .row_stride = 9000},            // groups that hold nothing
    {.rows = 2, .cols = 5003, .gap = 5, .base = 4611686018427387907, .row_stride = 7000},
    {.rows = 3, .cols = 17, .gap = 1, .base = INT64_MAX - 2 * 60 - 17, .row_stride = 60},  // up to the last index
};

constexpr Distribution kDistributions[] = {Distribution::normal, Distribution::rademacher};
constexpr uint64_t kKeys[] = {11, 0x8000000000000005u, 0xfffffffffffffffdu, 17};
constexpr uint64_t kRoundingKeys[] = {13, 0xfedcba9876543210u, 1};

// Tables of scalars have three columns, of which the piece's is the middle one and the others are wrong.
constexpr int64_t kColumns = 3, kColumn = 1;
inline std::vector<float> scalar_table(int64_t rows, float factor) {
    constexpr float kColumnValues[kColumns][8] = {{9, 9, 9, 9, 9, 9, 9, 9},
                                                  {1e-3f, 0.9f, 0.5f, 0.25f, 0.75f, 1.5f, 0x1p-6f, 0.125f},
                                                  {7, 7, 7, 7, 7, 7, 7, 7}};
    std::vector<float> table;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < kColumns; ++c) table.push_back(kColumnValues[c][row] * factor);
    table.shrink_to_fit();  // AddressSanitizer sees reads past the end
    return table;
}

inline Draws make_draws(Distribution distribution, const std::vector<uint64_t>& keys,
                        const std::vector<float>& coefficients) {
    return {.distribution = distribution,
            .count = int64_t(keys.size()),
            .columns = kColumns,
            .keys = keys.data(),
            .coefficients = coefficients.data()};
}

// Null: nothing is read, or written.
inline Piece make_piece(const Shape& s, const Matrix* in, const Matrix* out) {
    return {.in = in ? in->at(0) : nullptr,
            .out = out ? out->at(0) : nullptr,
            .rows = s.rows,
            .cols = s.cols,
            .ld_in = in ? in->ld : 0,
            .ld_out = out ? out->ld : 0,
            .base = s.base,
            .row_stride = s.row_stride,
            .tensor_id = 0x9abcdef0u,
            .column = kColumn};
}

inline Piece slice(const Piece& p, DType dtype, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    Piece part = p;
    const auto advance = [&](auto*& data, int64_t ld, DType type) {
        if (data) data = (std::decay_t<decltype(data)>)((char*)data + (row * ld + col) * size_of(type));
    };
    part.rows = rows;
    part.cols = cols;
    part.base += row * p.row_stride + col;
    part.mask_offset += row * p.cols;
    advance(part.in, p.ld_in, dtype);
    advance(part.out, p.ld_out, dtype);
    for (Companion* c : {&part.state0, &part.state1, &part.anchor, &part.delta}) advance(c->data, c->ld, c->dtype);
    return part;
}

// f(piece, group_begin, group_end) until all of the piece is done.
template <class F> void for_each_call(const Piece& p, DType dtype, Cut cut, F f) {
    const int64_t first = first_group(p), end = end_group(p), left = (p.cols + 2) / 3;
    const auto whole = [&](const Piece& part) { f(part, first_group(part), end_group(part)); };
    switch (cut) {
        case Cut::none: f(p, first, end); break;
        case Cut::singles:
            for (int64_t g = end - 1; g >= first; --g) f(p, g, g + 1);
            break;
        case Cut::rows:
            for (int64_t row = 0; row < p.rows; ++row) whole(slice(p, dtype, row, 1, 0, p.cols));
            break;
        case Cut::columns:
            if (left < p.cols) whole(slice(p, dtype, 0, p.rows, left, p.cols - left));
            whole(slice(p, dtype, 0, p.rows, 0, left));
            break;
    }
}

// f(dtype, shape, its index, name of the case so far)
template <class F> void for_each_shape(const std::string& family, F f) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (int64_t i = 0; i < int64_t(sizeof kShapes / sizeof *kShapes); ++i)
            f(dtype, kShapes[i], i, family + " " + std::to_string(int(dtype)) + " shape " + std::to_string(i));
}

}  // namespace pgap
