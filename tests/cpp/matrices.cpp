// The passes over matrices: low rank into weights, low rank in the forward.
#include "run.h"

namespace pgap {
namespace {

const char* const kDtypes[] = {"f32", "bf16", "f16"};

// Columns begin .. end of B^T (rank x columns) in panels, as ops.cpp lays them out.
Matrix packed(const Matrix& b, int64_t begin, int64_t end, int64_t panel) {
    const int64_t rank = b.rows, panels = (end - begin + panel - 1) / panel;
    Matrix to(DType::f32, 1, panels * panel * rank, 0, 0, 0);
    for (int64_t j = 0; j < panels * panel; ++j)
        for (int64_t k = 0; k < rank; ++k)
            to.floats()[(j / panel * rank + k) * panel + j % panel] = begin + j < end ? *(float*)b.at(k, begin + j) : 0;
    return to;
}

// Factors for bf16 weights are of that type themselves, and fit to be multiplied in pairs.
Matrix factor(DType dtype, int64_t rows, int64_t cols, uint64_t seed) {
    if (dtype != DType::bf16) return Matrix(DType::f32, rows, cols, 0, 0, seed);
    const Matrix halves(DType::bf16, rows, cols, 0, 0, seed, Fill::positive);
    Matrix to(DType::f32, rows, cols, 0, 0, 0);
    for (int64_t i = 0; i < rows * cols; ++i) {
        const uint32_t bits = uint32_t(((const uint16_t*)halves.at(0))[i] | (i % 3 ? 0 : 0x8000u)) << 16;
        std::memcpy(to.floats() + i, &bits, 4);
    }
    to.settle();
    return to;
}

// The numbers at i * along + k * step for k = 0, 1 .. rank as pairs, the even k high.
Matrix paired(const Matrix& m, int64_t rank, int64_t count, int64_t along, int64_t step, bool by_row) {
    const int64_t depth = (rank + 1) / 2;
    Matrix to(DType::f32, by_row ? count : depth, by_row ? depth : count, 0, 0, 0);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < rank; k += 2) {
            uint32_t high, low = 0;
            std::memcpy(&high, m.floats() + i * along + k * step, 4);
            if (k + 1 < rank) std::memcpy(&low, m.floats() + i * along + (k + 1) * step, 4);
            high |= low >> 16;
            std::memcpy(by_row ? to.at(i, k / 2) : to.at(k / 2, i), &high, 4);
        }
    to.settle();
    return to;
}

struct Rounding { float decay; bool stochastic; };

void low_rank_case(Run& run, const std::string& name, DType dtype, int64_t rank, int64_t rows, int64_t cols,
                   bool reads, Rounding rounding) {
    const uint64_t key = 29;
    const bool pairs = run.k.pairs && dtype == DType::bf16;
    Matrix left = pairs ? paired(factor(dtype, rows, rank, 12), rank, rows, rank, 1, true) : factor(dtype, rows, rank, 12);
    const Matrix b = pairs ? paired(factor(dtype, rank, cols, 13), rank, cols, 1, cols, false) : factor(dtype, rank, cols, 13);
    for (const Cut cut : kCuts) {
        Matrix in(dtype, rows, cols, rank % 3, 1, 14), out(dtype, rows, cols, rank % 2, 3, 0, Fill::nan);
        const auto call = [&](int64_t row, int64_t count, int64_t col, int64_t columns, bool singly) {
            const Matrix right = packed(b, col, col + columns, run.k.right_panel);
            LowRankPass pass = {};
            pass.dtype = dtype, pass.rank = rank, pass.coefficient = 0.3f, pass.decay = rounding.decay;
            pass.pairs = pairs, pass.left = left.floats() + row * left.cols, pass.right = right.floats();
            pass.rounding_key = rounding.stochastic ? &key : nullptr;
            Piece& p = pass.piece;
            p.rows = count, p.cols = columns, p.tensor_id = 77;
            p.row_stride = cols + 5, p.base = (int64_t(1) << 33) - 100 + row * p.row_stride + col;
            p.out = out.at(row, col), p.ld_out = out.ld;
            if (reads) p.in = in.at(row, col), p.ld_in = in.ld;
            if (!singly) return run.k.low_rank(pass, 0, count);
            for (int64_t i = count; i-- > 0;) run.k.low_rank(pass, i, i + 1);
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
        run.expect(out.guards_intact() && in.untouched() && left.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_low_rank(Run& run) {
    constexpr int64_t kRows[] = {1, 4, 6, 7, 13, 24}, kCols[] = {1, 15, 16, 23, 64, 65, 100, 131};
    constexpr Rounding kRoundings[] = {{0.0f, false}, {0.25f, false}, {0.25f, true}, {0.0f, true}};
    for (int64_t rank = 1; rank <= 140; ++rank)
        for (int d = 0; d < 3; ++d) {
            const int64_t turn = rank * 3 + d, rows = kRows[turn % 6], cols = kCols[turn / 2 % 8];
            low_rank_case(run, "low_rank " + std::string(kDtypes[d]) + " " + std::to_string(rank), DType(d), rank, rows,
                          cols, turn % 5 > 0, kRoundings[turn / 3 % 4]);
        }
}

namespace {

struct ForwardShape { int64_t rank, tokens, inputs, outputs; DType in, into, out; bool numbers; };

void forward_case(Run& run, const std::string& name, const ForwardShape& s) {
    const int64_t width = (s.rank + 7) / 8 * 8;
    Matrix x(s.in, s.tokens, s.inputs, s.rank % 3, 1, 15), b(DType::f32, s.rank, s.outputs, 0, 0, 16);
    const Matrix out_of = packed(b, 0, s.outputs, run.k.forward_panel);
    Matrix into(s.numbers ? s.into : DType::f32, 1, s.inputs * (s.numbers ? s.rank : width), 0, 0, 17);
    Matrix core(DType::f32, 1, s.rank * width, 0, 0, 18);
    for (int64_t i = 0; i < s.rank * width; ++i)
        if (i % width >= s.rank) core.floats()[i] = 0;
    for (int64_t i = 0; !s.numbers && i < s.inputs * width; ++i)
        if (i % width >= s.rank) into.floats()[i] = 0;
    std::vector<int64_t> numbers(static_cast<size_t>(s.tokens));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = int64_t(hashed(i) % uint64_t(s.inputs));
    for (const Cut cut : kCuts) {
        Matrix y(s.out, s.tokens, s.outputs, 0, 1, 19);
        Matrix scratch(DType::f32, 1, kForwardScratch, 0, 0, 0, Fill::nan);
        ForwardPass pass = {};
        pass.in_type = s.in, pass.into_type = into.dtype, pass.out_type = s.out;
        pass.into = into.at(0), pass.out_of = out_of.floats(), pass.out = y.at(0);
        pass.inputs = s.inputs, pass.outputs = s.outputs, pass.rank = s.rank, pass.width = width;
        if (s.numbers) pass.numbers = numbers.data();
        else pass.in = x.at(0), pass.ld_in = x.ld;
        const int64_t step = cut == Cut::none ? s.tokens : cut == Cut::singles ? 1 : cut == Cut::rows ? 4 : 13;
        for (int64_t begin = 0; begin < s.tokens; begin += step)
            run.k.forward(pass, core.floats(), begin, begin + step < s.tokens ? begin + step : s.tokens,
                          scratch.floats());
        Digest digest;
        y.add_to(digest);
        run.same(name, digest.value);
        run.expect(y.guards_intact() && scratch.guards_intact() && x.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_forward(Run& run) {
    constexpr int64_t kTokens[] = {1, 3, 5, 9, 12, 29, 61}, kInputs[] = {1, 7, 40, 128, 129, 300},
                      kOutputs[] = {1, 15, 16, 17, 32, 37, 70};
    for (int64_t rank = 1; rank <= 141; ++rank) {
        const int64_t t = rank * 5;
        const ForwardShape s = {rank == 141 ? kForwardRank : rank, kTokens[t % 7], kInputs[t / 7 % 6],
                                kOutputs[t / 3 % 7], DType(rank % 3), DType(rank / 3 % 3), DType(rank / 5 % 3),
                                rank % 4 == 0};
        forward_case(run, "forward " + std::to_string(rank), s);
    }
}

}  // namespace pgap
