// The passes over groups: dense, masked, preconditioned, affine, reduce.
#include <functional>

#include "run.h"

namespace pgap {
namespace {

struct Shape { int64_t rows, cols, gap, base, row_stride; };
constexpr Shape kShapes[] = {
    {1, 1, 0, 0, 1},
    {1, 31, 0, 5, 31},
    {1, 4096, 0, 8192, 4096},          // one whole group
    {1, 8200, 0, 4090, 8200},          // begins and ends within groups
    {3, 1025, 3, 1000, 1025},          // rows that follow each other in the index, with gaps in memory
    {23, 129, 2, 2147483641, 131},     // a shard, across 2^31
    {5, 7, 1, 8589934609, 4096},       // every group holds a run
    {4, 33, 0, 4503599627370495, 9000},         // groups that hold nothing
    {2, 5003, 5, 4611686018427387907, 7000},
    {3, 17, 1, INT64_MAX - 2 * 60 - 17, 60},    // up to the last index
};

constexpr float kTable[3][8] = {{9, 9, 9, 9, 9, 9, 9, 9},  // columns beside the piece's own are wrong
                                {1e-3f, 0.9f, 0.5f, 0.25f, 0.75f, 1.5f, 0x1p-6f, 0.125f},
                                {7, 7, 7, 7, 7, 7, 7, 7}};
constexpr int64_t kColumns = 3, kColumn = 1;
constexpr uint64_t kKeys[] = {11, 0x8000000000000005u, 0xfffffffffffffffdu, 17};
constexpr uint64_t kRounding[] = {13, 0xfedcba9876543210u, 1};

// [rows][kColumns], with the rows of kTable's columns times a factor
std::vector<float> table(int64_t rows, float factor) {
    std::vector<float> t;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < kColumns; ++c) t.push_back(kTable[c][row] * factor);
    t.shrink_to_fit();
    return t;
}

Piece piece_of(const Shape& s) {
    Piece p = {};
    p.rows = s.rows, p.cols = s.cols, p.base = s.base, p.row_stride = s.row_stride;
    p.tensor_id = 0x9abcdef0u, p.scalar = kColumn;
    return p;
}

void read(Piece& p, const Matrix& in) { p.in = in.at(0), p.ld_in = in.ld; }
void write(Piece& p, const Matrix& out) { p.out = out.at(0), p.ld_out = out.ld; }

// The part of a piece from (row, col) on.
Piece part_of(const Piece& p, DType dtype, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    Piece part = p;
    const auto move = [&](auto* data, int64_t ld, DType type) {
        return data ? (decltype(data))((char*)data + (row * ld + col) * size_of(type)) : nullptr;
    };
    part.rows = rows, part.cols = cols, part.base += row * p.row_stride + col, part.element += row * p.cols;
    part.in = move(p.in, p.ld_in, dtype), part.out = move(p.out, p.ld_out, dtype);
    part.first.data = move(p.first.data, p.first.ld, p.first.dtype);
    part.second.data = move(p.second.data, p.second.ld, p.second.dtype);
    return part;
}

// f(piece, group_begin, group_end) until all is done.
template <class F> void each_call(const Piece& p, DType dtype, Cut cut, F f) {
    const int64_t first = first_group(p), end = end_group(p), left = (p.cols + 2) / 3;
    const auto whole = [&](const Piece& part) { f(part, first_group(part), end_group(part)); };
    switch (cut) {
        case Cut::none: f(p, first, end); break;
        case Cut::singles:
            for (int64_t g = end - 1; g >= first; --g) f(p, g, g + 1);
            break;
        case Cut::rows:
            for (int64_t row = 0; row < p.rows; ++row) whole(part_of(p, dtype, row, 1, 0, p.cols));
            break;
        case Cut::columns:
            if (left < p.cols) whole(part_of(p, dtype, 0, p.rows, left, p.cols - left));
            whole(part_of(p, dtype, 0, p.rows, 0, left));
            break;
    }
}

// f(dtype, shape, its number, name so far)
void each_shape(const std::string& pass, const std::function<void(DType, const Shape&, int64_t, std::string)>& f) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (int64_t i = 0; i < int64_t(sizeof kShapes / sizeof *kShapes); ++i)
            f(dtype, kShapes[i], i, pass + " " + std::to_string(int(dtype)) + " shape " + std::to_string(i));
}

constexpr Distribution kDistributions[] = {Distribution::normal, Distribution::rademacher};

// ---- dense ------------------------------------------------------------------------------------------------------

struct Stages { std::vector<int64_t> draws; float decay; bool stochastic; };
const Stages kStages[] = {{{1}, 0, false},        {{2}, 0.5f, false}, {{1, 0, 2}, 0.25f, true}, {{0}, 0.5f, true},
                          {{1, 1}, 0.0f, false},  {{1}, 0.0f, true}};
enum class Source { none, apart, same };

void dense_case(Run& run, const std::string& name, DType dtype, const Shape& s, Distribution distribution,
                const Stages& stages, Source source) {
    int64_t draws = 0;
    for (const int64_t n : stages.draws) draws += n;
    const std::vector<float> a = table(draws, 1.0f), decay = table(int64_t(stages.draws.size()), stages.decay);
    const std::vector<uint64_t> keys(kKeys, kKeys + draws), rounding(kRounding, kRounding + stages.draws.size());
    const DensePass pass = {dtype, {distribution, draws, kColumns, keys.data(), a.data()},
                            int64_t(stages.draws.size()), stages.draws.data(), decay.data(),
                            stages.stochastic ? rounding.data() : nullptr};
    for (const Cut cut : kCuts) {
        const Fill fill = source == Source::same ? Fill::mixed : Fill::nan;
        Matrix in(dtype, s.rows, s.cols, s.gap, 3, 1), out(dtype, s.rows, s.cols, s.gap * 2, 1, 1, fill);
        Piece p = piece_of(s);
        write(p, out);
        if (source != Source::none) read(p, source == Source::same ? out : in);
        each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
            run.k.dense(pass, part, begin, end);
        });
        Digest digest;
        out.add_to(digest);
        run.same(name, digest.value);
        run.expect(out.guards_intact() && in.untouched(), name + ": memory beside");
    }
}

void test_dense(Run& run) {
    each_shape("dense", [&](DType dtype, const Shape& s, int64_t i, const std::string& name) {
        for (const Distribution distribution : kDistributions)
            for (const Source source : {Source::none, Source::apart, Source::same})
                for (int64_t v = i % 2; v < 6; v += 2)
                    dense_case(run, name + " " + std::to_string(int(distribution)) + std::to_string(int(source)) +
                                        std::to_string(v),
                               dtype, s, distribution, kStages[v], source);
    });
}

// ---- masked -----------------------------------------------------------------------------------------------------

void test_masked(Run& run) {
    each_shape("masked", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const Mask mask : {Mask::threshold, Mask::share, Mask::bits})
            for (const bool stochastic : {false, true}) {
                const std::string name = start + " " + std::to_string(int(mask)) + std::to_string(stochastic);
                const int64_t draws = i % 3;
                const std::vector<float> a = table(draws, 1.0f), decay = table(1, i % 2 ? 100.0f : 0.0f);
                const std::vector<float> threshold = table(1, 250.0f);
                const std::vector<uint64_t> keys(kKeys, kKeys + draws);
                const MaskedPass pass = {dtype, {kDistributions[i % 2], draws, kColumns, keys.data(), a.data()},
                                         decay.data(), stochastic ? kRounding : nullptr, mask, threshold.data(), 23,
                                         i == 0 ? int64_t(1) << 32 : int64_t(3) << 30};
                for (const Cut cut : kCuts) {
                    if (mask == Mask::bits && cut == Cut::columns) continue;  // bits are counted along whole rows
                    Matrix out(dtype, s.rows, s.cols, s.gap, 1, 2);
                    Matrix bits(DType::f32, 1, (s.rows * s.cols + 31) / 32, 0, 1, 3);
                    Piece p = piece_of(s);
                    read(p, out), write(p, out);
                    if (mask == Mask::bits) p.bits = (const uint32_t*)bits.at(0);
                    each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
                        run.k.masked(pass, part, begin, end);
                    });
                    Digest digest;
                    out.add_to(digest);
                    run.same(name, digest.value);
                    run.expect(out.guards_intact() && bits.untouched(), name + ": memory beside");
                }
            }
    });
}

// ---- preconditioned -----------------------------------------------------------------------------------------------

struct RuleKind { Rule rule; bool second; int64_t scalars; };
constexpr RuleKind kRules[] = {{Rule::perturb, false, 0}, {Rule::momentum, false, 2}, {Rule::adam, true, 7},
                               {Rule::hizoo, false, 3},   {Rule::helene, true, 8},    {Rule::helene_refresh, true, 8}};

void test_preconditioned(Run& run) {
    each_shape("preconditioned", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const RuleKind& kind : kRules) {
            const std::string name = start + " rule " + std::to_string(int(kind.rule));
            const int64_t draws = 1 + i % 2;
            const std::vector<float> c = table(draws, 1.0f), r = table(draws, -2.0f), decay = table(1, i % 3 * 40.0f);
            const std::vector<float> scalars = table(kind.scalars, 1.0f);
            const std::vector<uint64_t> keys(kKeys, kKeys + draws);
            const PreconditionedPass pass = {dtype, {kDistributions[i / 2 % 2], draws, kColumns, keys.data(), c.data()},
                                             r.data(), kind.rule, kind.scalars, scalars.data(), decay.data(),
                                             i % 2 ? kRounding : nullptr};
            for (const Cut cut : kCuts) {
                Matrix out(dtype, s.rows, s.cols, s.gap, 3, 4);
                Matrix first(DType::f32, s.rows, s.cols, s.gap + 1, 1, 5, Fill::positive);
                Matrix second(DType::f32, s.rows, s.cols, s.gap / 2, 2, 6, Fill::positive);
                Piece p = piece_of(s);
                read(p, out), write(p, out);
                p.first = first.companion();
                if (kind.second) p.second = second.companion();
                each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
                    run.k.preconditioned(pass, part, begin, end);
                });
                Digest digest;
                out.add_to(digest), first.add_to(digest), second.add_to(digest);
                run.same(name, digest.value);
                run.expect(out.guards_intact() && first.guards_intact() && second.guards_intact(),
                           name + ": memory beside");
                run.expect((kind.rule == Rule::perturb ? first.untouched() : true) &&
                               (kind.second || second.untouched()),
                           name + ": states that are not the rule's");
            }
        }
    });
}

// ---- affine -------------------------------------------------------------------------------------------------------

void test_affine(Run& run) {
    each_shape("affine", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const DType other : {DType::f32, dtype})
            for (const bool delta : {false, true})
                for (const bool stochastic : {false, true}) {
                    const std::string name = start + " " + std::to_string(int(other)) + std::to_string(delta) +
                                             std::to_string(stochastic);
                    const std::vector<float> c = table(1, 900.0f);
                    const AffinePass pass = {dtype, c.data(), stochastic ? kRounding : nullptr};
                    for (const bool in_place : {true, false})
                        for (const Cut cut : kCuts) {
                            Matrix in(dtype, s.rows, s.cols, s.gap, i % 4, 7);
                            Matrix apart(dtype, s.rows, s.cols, s.gap * 2, 1, 0, Fill::nan);
                            Matrix first(other, s.rows, s.cols, s.gap + 1, 1, 8);
                            Matrix second(other, s.rows, s.cols, s.gap * 2, 5, 9);
                            Matrix& out = in_place ? in : apart;
                            Piece p = piece_of(s);
                            write(p, out);
                            if (in_place || !delta) read(p, in);
                            p.first = first.companion();
                            if (delta) p.second = second.companion();
                            each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
                                run.k.affine(pass, part, begin, end);
                            });
                            Digest digest;
                            out.add_to(digest);
                            run.same(name, digest.value);
                            run.expect(out.guards_intact() && (in_place || in.untouched()) && first.untouched() &&
                                           second.untouched(),
                                       name + ": memory beside");
                        }
                }
    });
}

// Vectors round as one number at a time does: ties, carries, subnormal numbers alone and among others, what is not finite.
void test_rounding(Run& run) {
    std::vector<float> x;
    for (const uint32_t high : {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3300u, 0x387fu, 0x3880u, 0x3f80u, 0x3f81u, 0x477fu,
                                0x7f7fu, 0x7f80u, 0x7fc0u})
        for (const uint32_t low : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xefffu, 0xffffu})
            for (const uint32_t sign : {0u, 0x80000000u}) {
                const uint32_t bits = sign | high << 16 | low;
                x.push_back(0.0f), std::memcpy(&x.back(), &bits, 4);
            }
    x.insert(x.end(), 99, 1.0f);
    x[x.size() - 50] = 0x1p-130f;  // the only one of its vector
    const int64_t n = int64_t(x.size());
    const float one[kColumns] = {9, 1, 7};
    for (const DType dtype : {DType::bf16, DType::f16}) {
        std::vector<uint16_t> out(x.size());
        std::vector<float> origin(x.size(), -0.0f), expected = x, found(x.size());
        Piece p = piece_of({1, n, 0, 0, n});
        p.in = p.out = out.data(), p.ld_in = p.ld_out = n;
        p.first = {origin.data(), n, DType::f32}, p.second = {x.data(), n, DType::f32};
        run.k.affine({dtype, one, nullptr}, p, first_group(p), end_group(p));  // fma(1, x, -0) = x
        run.k.to_float(dtype, out.data(), found.data(), n);
        run.k.round_to(dtype, expected.data(), n);
        for (size_t i = 0; i < x.size(); ++i)
            run.expect(bits_of(DType::f32, &found[i]) == bits_of(DType::f32, &expected[i]),
                       "rounding " + std::to_string(int(dtype)) + " of number " + std::to_string(i));
    }
}

// ---- reduce -------------------------------------------------------------------------------------------------------

void test_reduce(Run& run) {
    each_shape("reduce", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const bool seeded : {false, true})
            for (const bool anchored : {false, true}) {
                const std::string name = start + " " + std::to_string(seeded) + std::to_string(anchored);
                const ReducePass pass = {dtype, kDistributions[i % 2], seeded ? kKeys : nullptr};
                for (const Cut cut : {Cut::none, Cut::singles}) {  // sums are of the groups of one piece
                    Matrix in(dtype, s.rows, s.cols, s.gap, 1, 10);
                    Matrix first(i % 2 ? dtype : DType::f32, s.rows, s.cols, s.gap + 1, 3, 11);
                    Piece p = piece_of(s);
                    read(p, in);
                    if (anchored) p.first = first.companion();
                    std::vector<double> sums(size_t(end_group(p) - first_group(p)), __builtin_nan(""));
                    each_call(p, dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
                        run.k.reduce(pass, part, begin, end, sums.data() + (begin - first_group(p)));
                    });
                    Digest digest;
                    for (const double sum : sums) {
                        uint64_t bits;
                        std::memcpy(&bits, &sum, 8);
                        digest.add(bits);
                        run.expect(sum == sum, name + ": a sum for every group");
                    }
                    run.same(name, digest.value);
                    run.expect(in.untouched() && first.untouched(), name + ": memory beside");
                }
            }
    });
}

// A row vector expanded over rows, in memory once, sums like a matrix of equal rows.
void test_expanded_rows(Run& run) {
    each_shape("expanded", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const bool seeded : {false, true})
            for (const bool anchored : {false, true}) {
                const std::string name = start + " " + std::to_string(seeded) + std::to_string(anchored);
                const ReducePass pass = {dtype, kDistributions[i % 2], seeded ? kKeys : nullptr};
                const Matrix row(dtype, 1, s.cols, 0, 1, 10), anchor(DType::f32, 1, s.cols, 0, 3, 11);
                for (const bool expanded : {true, false}) {
                    const auto repeated = [&](const Matrix& from) {
                        Matrix to(from.dtype, s.rows, s.cols, expanded ? -s.cols : 1, 2, 0);
                        for (int64_t r = 0; r < s.rows; ++r)
                            std::memcpy(to.at(r), from.at(0), size_t(s.cols * size_of(from.dtype)));
                        to.settle();
                        return to;
                    };
                    Matrix in = repeated(row), first = repeated(anchor);
                    Piece p = piece_of(s);
                    read(p, in);
                    if (anchored) p.first = first.companion();
                    std::vector<double> sums(size_t(end_group(p) - first_group(p)), __builtin_nan(""));
                    run.k.reduce(pass, p, first_group(p), end_group(p), sums.data());
                    Digest digest;
                    for (const double sum : sums) {
                        uint64_t bits;
                        std::memcpy(&bits, &sum, 8);
                        digest.add(bits);
                    }
                    run.same(name, digest.value);
                    run.expect(in.untouched() && first.untouched(), name + ": memory beside");
                }
            }
    });
}

}  // namespace

void test_pieces(Run& run) {
    test_dense(run);
    test_masked(run);
    test_preconditioned(run);
    test_affine(run);
    test_rounding(run);
    test_reduce(run);
    test_expanded_rows(run);
}

}  // namespace pgap
