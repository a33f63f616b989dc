#include "shapes.h"

namespace pgap {
namespace {

// The sums of a piece's groups.
std::vector<double> group_sums(Run& run, const ReductionPass& pass, const Piece& p, Cut cut) {
    std::vector<double> sums(size_t(end_group(p) - first_group(p)), __builtin_nan(""));
    for_each_call(p, pass.dtype, cut, [&](const Piece& part, int64_t begin, int64_t end) {
        run.k.reduction(pass, part, begin, end, sums.data() + (begin - first_group(p)));
    });
    return sums;
}

void reduction_case(Run& run, const std::string& name, DType dtype, const Shape& s, int64_t i, bool seeded,
                    bool anchored) {
    const ReductionPass pass = {
        .dtype = dtype, .distribution = kDistributions[i % 2], .key = seeded ? kKeys : nullptr};
    for (const Cut cut : {Cut::none, Cut::singles}) {  // a slice of the piece would have other sums
        Matrix in(dtype, s.rows, s.cols, s.gap, 1, 10);
        Matrix anchor(i % 2 ? dtype : DType::f32, s.rows, s.cols, s.gap + 1, 3, 11);
        Piece p = make_piece(s, &in, nullptr);
        if (anchored) p.anchor = anchor.companion();
        const std::vector<double> sums = group_sums(run, pass, p, cut);
        for (const double sum : sums) run.expect(sum == sum, name + ": a sum for every group");
        Digest digest;
        digest.add(sums);
        run.same(name, digest.value);
        run.expect(in.untouched() && anchor.untouched(), name + ": memory beside");
    }
}

// A matrix whose rows are all that of `row`; expanded, it has the row once in memory.
Matrix repeat_row(const Matrix& row, int64_t rows, bool expanded) {
    Matrix to(row.dtype, rows, row.cols, expanded ? -row.cols : 1, 2, 0);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to.at(r), row.at(0), size_t(row.cols * size_of(row.dtype)));
    to.remember();
    return to;
}

void expanded_case(Run& run, const std::string& name, DType dtype, const Shape& s, int64_t i, bool seeded,
                   bool anchored) {
    const ReductionPass pass = {
        .dtype = dtype, .distribution = kDistributions[i % 2], .key = seeded ? kKeys : nullptr};
    for (const bool expanded : {true, false}) {
        Matrix in = repeat_row(Matrix(dtype, 1, s.cols, 0, 1, 10), s.rows, expanded);
        Matrix anchor = repeat_row(Matrix(DType::f32, 1, s.cols, 0, 3, 11), s.rows, expanded);
        Piece p = make_piece(s, &in, nullptr);
        if (anchored) p.anchor = anchor.companion();
        Digest digest;
        digest.add(group_sums(run, pass, p, Cut::none));
        run.same(name, digest.value);
        run.expect(in.untouched() && anchor.untouched(), name + ": memory beside");
    }
}

}  // namespace

void test_reduction(Run& run) {
    for_each_shape("reduction", [&](DType dtype, const Shape& s, int64_t i, const std::string& start) {
        for (const bool seeded : {false, true})
            for (const bool anchored : {false, true}) {
                const std::string name = start + " " + std::to_string(seeded) + std::to_string(anchored);
                reduction_case(run, name, dtype, s, i, seeded, anchored);
                expanded_case(run, name + " expanded", dtype, s, i, seeded, anchored);
            }
    });
}

}  // namespace pgap
