#include "panels.h"
#include "run.h"

namespace pgap {
namespace {

// Factors of bf16 weights have values of that type, in a range in which pairs are exact.
Matrix make_factor(DType dtype, int64_t rows, int64_t cols, uint64_t seed) {
    if (dtype != DType::bf16) return Matrix(DType::f32, rows, cols, 0, 0, seed);
    const Matrix halves(DType::bf16, rows, cols, 0, 0, seed, Fill::positive);
    Matrix to(DType::f32, rows, cols, 0, 0, 0);
    for (int64_t i = 0; i < rows * cols; ++i) {
        const uint32_t bits = uint32_t(((const uint16_t*)halves.at(0))[i] | (i % 3 ? 0 : 0x8000u)) << 16;
        std::memcpy(to.floats() + i, &bits, 4);
    }
    to.remember();
    return to;
}

// The value pair of k and k + 1, each for even k: the even one high.
uint32_t make_pair(const float* even, const float* odd) {
    uint32_t high, low = 0;
    std::memcpy(&high, even, 4);
    if (odd) std::memcpy(&low, odd, 4);
    return high | low >> 16;
}

Matrix pair_columns(const Matrix& m) {  // of P, whose columns are k
    Matrix to(DType::f32, m.rows, (m.cols + 1) / 2, 0, 0, 0);
    for (int64_t i = 0; i < m.rows; ++i)
        for (int64_t k = 0; k < m.cols; k += 2) {
            const auto value = [&](int64_t j) { return j < m.cols ? (const float*)m.at(i, j) : nullptr; };
            const uint32_t pair = make_pair(value(k), value(k + 1));
            std::memcpy(to.at(i, k / 2), &pair, 4);
        }
    to.remember();
    return to;
}

Matrix pair_rows(const Matrix& m) {  // of B^T, whose rows are k
    Matrix to(DType::f32, (m.rows + 1) / 2, m.cols, 0, 0, 0);
    for (int64_t k = 0; k < m.rows; k += 2)
        for (int64_t i = 0; i < m.cols; ++i) {
            const auto value = [&](int64_t j) { return j < m.rows ? (const float*)m.at(j, i) : nullptr; };
            const uint32_t pair = make_pair(value(k), value(k + 1));
            std::memcpy(to.at(k / 2, i), &pair, 4);
        }
    to.remember();
    return to;
}

Matrix squared(const Matrix& m) {
    Matrix to(DType::f32, m.rows, m.cols, 0, 0, 0);
    for (int64_t i = 0; i < m.rows; ++i)
        for (int64_t j = 0; j < m.cols; ++j) {
            const float x = *(const float*)m.at(i, j);
            *(float*)to.at(i, j) = x * x;
        }
    to.remember();
    return to;
}

struct Rounding { float decay; bool stochastic; };

// quotient: by the root of a product of the same factors, whose elements are then > 0.
void lowrank_case(Run& run, const std::string& name, DType dtype, int64_t rank, int64_t rows, int64_t cols, bool reads,
                  Rounding rounding, bool quotient = false) {
    const uint64_t key = 29;
    const bool pairs = run.k.pairs && dtype == DType::bf16 && !quotient;
    Matrix left = make_factor(dtype, rows, rank, 12), right = make_factor(dtype, rank, cols, 13);
    Matrix packed_left = pairs ? pair_columns(left) : std::move(left);
    const Matrix items_right = pairs ? pair_rows(right) : std::move(right);
    const Matrix squares_left = squared(packed_left), squares_right = squared(items_right);
    for (const Cut cut : kCuts) {
        Matrix in(dtype, rows, cols, rank % 3, 1, 14), out(dtype, rows, cols, rank % 2, 3, 0, Fill::nan);
        const auto call = [&](int64_t row, int64_t count, int64_t col, int64_t columns, bool singly) {
            const Matrix packed_right = pack_panels(items_right, col, col + columns, run.k.lowrank_panel);
            const Matrix packed_squares = pack_panels(squares_right, col, col + columns, run.k.lowrank_panel);
            const int64_t row_stride = cols + 5;
            const LowrankPass pass = {.dtype = dtype,
                                      .piece = {.in = reads ? in.at(row, col) : nullptr,
                                                .out = out.at(row, col),
                                                .rows = count,
                                                .cols = columns,
                                                .ld_in = reads ? in.ld : 0,
                                                .ld_out = out.ld,
                                                .base = (int64_t(1) << 33) - 100 + row * row_stride + col,
                                                .row_stride = row_stride,
                                                .tensor_id = 77},
                                      .left = (const float*)packed_left.at(row),
                                      .right = packed_right.floats(),
                                      .rank = rank,
                                      .coefficient = 0.3f,
                                      .decay = rounding.decay,
                                      .rounding_key = rounding.stochastic ? &key : nullptr,
                                      .pairs = pairs,
                                      .below_left = quotient ? (const float*)squares_left.at(row) : nullptr,
                                      .below_right = packed_squares.floats(),
                                      .e = 0.1f};
            if (!singly) return run.k.lowrank(pass, 0, count);
            for (int64_t i = count; i-- > 0;) run.k.lowrank(pass, i, i + 1);
        };
        const int64_t half = (cols + 1) / 2;
        switch (cut) {
            case Cut::none: call(0, rows, 0, cols, false); break;
            case Cut::singles: call(0, rows, 0, cols, true); break;
            case Cut::rows:
                for (int64_t row = 0; row < rows; row += 5) call(row, rows - row < 5 ? rows - row : 5, 0, cols, false);
                break;
            case Cut::columns:
                if (half < cols) call(0, rows, half, cols - half, false);
                call(0, rows, 0, half, false);
                break;
        }
        Digest digest;
        out.add_to(digest);
        run.same(name, digest.value);
        run.expect(out.guards_intact() && in.untouched() && packed_left.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_lowrank(Run& run) {
    constexpr const char* kDTypes[] = {"f32", "bf16", "f16"};
    constexpr int64_t kRows[] = {1, 4, 6, 7, 13, 24}, kCols[] = {1, 15, 16, 23, 64, 65, 100, 131};
    constexpr Rounding kRoundings[] = {{.decay = 0, .stochastic = false},
                                       {.decay = 0.25f, .stochastic = false},
                                       {.decay = 0.25f, .stochastic = true},
                                       {.decay = 0, .stochastic = true}};
    for (int64_t rank = 1; rank <= 140; ++rank)
        for (int d = 0; d < 3; ++d) {
            const int64_t turn = rank * 3 + d, rows = kRows[turn % 6], cols = kCols[turn / 2 % 8];
            lowrank_case(run, "lowrank " + std::string(kDTypes[d]) + " " + std::to_string(rank), DType(d), rank, rows,
                         cols, turn % 5 > 0, kRoundings[turn / 3 % 4]);
            if (rank % 9 == 0)
                lowrank_case(run, "quotient " + std::string(kDTypes[d]) + " " + std::to_string(rank), DType(d), rank,
                             rows, cols, turn % 5 > 0, kRoundings[turn / 3 % 4], true);
        }
}

}  // namespace pgap
