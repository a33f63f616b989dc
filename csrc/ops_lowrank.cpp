// The op of lowrank.inl: W <- round(W - decay W + a A C B^T), with A, B and C stored or drawn from keys; or that
// divided by sqrt((A A) diag(v) (B B)^T + e), element by element, with a diagonal C.
//
// The list of weights is processed in batches, each in three parallel steps: pack C of every weight; pack P = A C and
// B^T, both rounded to the weights' dtype, and for a quotient Q = (A A) diag(v) and (B B)^T, which stay float32; pass
// over the weights.
#include "factors.h"

#include <cmath>
#include <cstring>

namespace {

using namespace pgap;

enum class Core { none, diagonal, full, regenerated };  // regenerated: full, drawn from its key

Core parse_core(const std::string& name) {
    if (name == "none") return Core::none;
    if (name == "diagonal") return Core::diagonal;
    if (name == "full") return Core::full;
    STD_TORCH_CHECK(name == "regenerated", "core_kind: accepted: none, diagonal, full, regenerated");
    return Core::regenerated;
}

// ---- factors ----------------------------------------------------------------------------------------------------

// The factor of weight t: stored[t], or if none are stored, the normals of `key` from index `base` on.
Factor make_factor(const std::vector<Tensor>& stored, size_t t, int64_t base, uint32_t tensor_id, uint64_t key) {
    if (stored.empty())
        return {.dtype = DType::f32, .data = nullptr, .base = base, .tensor_id = tensor_id, .key = key};
    STD_TORCH_CHECK(stored[t].is_cpu() && stored[t].is_contiguous(), "factors: accepted: contiguous CPU tensors");
    return {.dtype = parse_dtype(stored[t], "factors"), .data = stored[t].const_data_ptr()};
}

// Copies a matrix of `depth` rows, read with these strides, into panels of `width` columns: [panel][depth][width].
void pack_panels(const float* from, int64_t depth, int64_t row_stride, int64_t columns, int64_t column_stride,
                 float* panels) {
    const int64_t width = kernels().lowrank_panel;
    for (int64_t j = 0; j < columns; ++j) {
        float* to = panels + j / width * width * depth + j % width;
        for (int64_t k = 0; k < depth; ++k) to[k * width] = from[k * row_stride + j * column_stride];
    }
}

// ---- pairs of bf16 ----------------------------------------------------------------------------------------------

// The least and the greatest magnitude of some numbers. Zeros do not count, and the least is at most 1: only small ones
// matter.
struct MagnitudeRange {
    double least = 1.0, greatest = 0.0;
    void add(const float* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const double magnitude = std::fabs(values[i]);
            raise_to(magnitude);
            if (magnitude != 0.0 && magnitude < least) least = magnitude;
        }
    }
    void add(const MagnitudeRange& other) {
        least = std::min(least, other.least);
        raise_to(other.greatest);
    }

private:
    void raise_to(double magnitude) {
        if (!(magnitude <= greatest) && greatest == greatest) greatest = magnitude;  // a NaN comes in, and stays
    }
};

// Whether the instruction for pairs gives the same bits as a chain of fma. It flushes subnormal numbers to zero, so no
// factor, product or partial sum may be subnormal; and none may overflow. Two bf16, of 8 significant bits each, with
// leading bits 2^i and 2^j, have a product that is a multiple of 2^(i + j - 14). With i + j >= -112, which the bound on
// the least product ensures, all products, and so all partial sums, are multiples of 2^-126: zero or normal.
bool exact_in_pairs(const MagnitudeRange& a, const MagnitudeRange& b, int64_t rank) {
    return std::min(a.least, b.least) >= 0x1p-126 && a.least * b.least >= 0x1p-110 &&
           a.greatest * b.greatest * double(rank) <= 0x1p126;
}

// Joins the values of each row, which bf16 can hold, in pairs of 32 bits: k = 2 i in the high half, 2 i + 1, or 0 after
// the last, in the low one. `pairs` may be `values`.
void pair_rows(const float* values, int64_t rows, int64_t rank, float* pairs) {
    for (int64_t row = 0; row < rows; ++row, values += rank)
        for (int64_t k = 0; k < rank; k += 2) {
            uint32_t high, low = 0;
            std::memcpy(&high, values + k, 4);
            if (k + 1 < rank) std::memcpy(&low, values + k + 1, 4);
            high |= low >> 16;
            std::memcpy(pairs++, &high, 4);
        }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// One weight of the list and its packed factors.
struct PackedWeight {
    Piece piece;
    Factor a, b;
    std::vector<float> core;             // C in panels, as the right side of P = A C; a diagonal core's r numbers
    std::vector<float> left, right;      // P and, in panels, B^T
    std::vector<float> below;            // v; empty: no quotient
    std::vector<float> below_left, below_right;
    std::vector<MagnitudeRange> ranges;  // of what each item of Packer has packed
    LowrankPass pass;
};

// Packs P and B^T of a weight. The work is cut into items, so that threads can share one large matrix: first blocks of
// rows of P, then groups of panels of B^T. A pass over the weights has items of its own, blocks of rows.
class Packer {
public:
    Packer(DType dtype, int64_t rank, Core core, bool pairs) : dtype_(dtype), rank_(rank), core_(core), pairs_(pairs) {}

    int64_t item_count(const PackedWeight& w) const {
        if (w.piece.rows * w.piece.cols == 0) return 0;
        return left_items(w) + (w.piece.cols + right_columns() - 1) / right_columns();
    }
    void allocate(PackedWeight& w) const {
        const int64_t panel = kernels().lowrank_panel, panels = (w.piece.cols + panel - 1) / panel;
        w.left.resize(size_t(w.piece.rows * depth()));
        w.right.assign(size_t(panels * panel * depth()), 0.0f);  // zeros pad the last panel
        if (!w.below.empty()) {
            w.below_left.resize(w.left.size());
            w.below_right.assign(w.right.size(), 0.0f);
        }
        w.ranges.assign(size_t(item_count(w)), MagnitudeRange());
    }
    void pack_item(PackedWeight& w, int64_t item) const {
        const int64_t left = left_items(w);
        MagnitudeRange& range = w.ranges[size_t(item)];
        if (item < left) pack_left(w, item * kLeftRows, std::min((item + 1) * kLeftRows, w.piece.rows), range);
        else pack_right(w, (item - left) * right_columns(), range);
    }
    // Whether pairs of this weight, all of whose items are packed, give the same bits as floats.
    bool pairs_are_exact(const PackedWeight& w) const {
        MagnitudeRange left, right;
        for (size_t i = 0; i < w.ranges.size(); ++i) (int64_t(i) < left_items(w) ? left : right).add(w.ranges[i]);
        return exact_in_pairs(left, right, rank_);
    }

private:
    static constexpr int64_t kLeftRows = 192;   // rows of P in an item: a multiple of every tile's height
    static constexpr int64_t kRightPanels = 4;  // panels of B^T in an item

    static int64_t right_columns() { return kRightPanels * kernels().lowrank_panel; }
    int64_t left_items(const PackedWeight& w) const { return (w.piece.rows + kLeftRows - 1) / kLeftRows; }
    // Floats, or pairs, in a row of P and a column of B^T.
    int64_t depth() const { return pairs_ ? (rank_ + 1) / 2 : rank_; }

    // Rounds rows of P or B to the weights' dtype and, if the pass takes pairs, joins them.
    void round_and_pair(std::vector<float>& rows, MagnitudeRange& range) const {
        const int64_t count = int64_t(rows.size());
        if (dtype_ != DType::f32) kernels().round_to(dtype_, rows.data(), count);
        if (!pairs_) return;
        range.add(rows.data(), count);
        pair_rows(rows.data(), count / rank_, rank_, rows.data());
        rows.resize(size_t(count / rank_ * depth()));
    }

    // P = A C is itself a product of the form P B^T, so the kernel makes it: A takes the place of P, and C of B^T.
    void pack_left(PackedWeight& w, int64_t begin, int64_t end, MagnitudeRange& range) const {
        std::vector<float> buffer, p(size_t((end - begin) * rank_));
        const float* a = read_factor(w.a, begin * rank_, (end - begin) * rank_, buffer);
        if (core_ == Core::none) {
            std::copy_n(a, p.size(), p.data());
        } else if (core_ == Core::diagonal) {
            for (size_t i = 0; i < p.size(); ++i) p[i] = a[i] * w.core[i % size_t(rank_)];
        } else {
            const LowrankPass product = {.dtype = DType::f32,
                                         .piece = {.out = p.data(),
                                                   .rows = end - begin,
                                                   .cols = rank_,
                                                   .ld_out = rank_,
                                                   .row_stride = rank_},
                                         .left = a,
                                         .right = w.core.data(),
                                         .rank = rank_,
                                         .coefficient = 1.0f};
            kernels().lowrank(product, 0, end - begin);
        }
        round_and_pair(p, range);
        std::copy(p.begin(), p.end(), w.left.begin() + begin * depth());
        if (w.below.empty()) return;
        float* q = w.below_left.data() + begin * rank_;
        for (int64_t i = 0; i < int64_t(p.size()); ++i) q[i] = a[i] * a[i] * w.below[size_t(i % rank_)];
    }

    void pack_right(PackedWeight& w, int64_t begin, MagnitudeRange& range) const {
        const int64_t columns = std::min(right_columns(), w.piece.cols - begin), count = columns * rank_;
        std::vector<float> buffer;
        const float* b = read_factor(w.b, begin * rank_, count, buffer);
        if (dtype_ != DType::f32) {
            if (b != buffer.data()) buffer.assign(b, b + count);  // b is the caller's tensor: round a copy
            round_and_pair(buffer, range);
            b = buffer.data();
        }
        pack_panels(b, depth(), 1, columns, depth(), w.right.data() + begin * depth());
        if (w.below.empty()) return;
        std::vector<float> squares(b, b + count);
        for (float& x : squares) x *= x;
        pack_panels(squares.data(), rank_, 1, columns, rank_, w.below_right.data() + begin * rank_);
    }

    DType dtype_;
    int64_t rank_;
    Core core_;
    bool pairs_;
};

std::vector<float> pack_core(Core kind, const std::vector<Tensor>& stored, size_t t, int64_t rank, uint32_t tensor_id,
                             uint64_t key) {
    if (kind == Core::none) return {};
    std::vector<float> buffer;
    const int64_t count = kind == Core::diagonal ? rank : rank * rank;
    const float* c = read_factor(make_factor(stored, t, 0, tensor_id, key), 0, count, buffer);
    if (kind == Core::diagonal) return std::vector<float>(c, c + count);
    const int64_t panel = kernels().lowrank_panel;
    std::vector<float> packed(size_t((rank + panel - 1) / panel * panel * rank), 0.0f);
    pack_panels(c, rank, rank, rank, 1, packed.data());
    return packed;
}

// ---- the op -----------------------------------------------------------------------------------------------------

// keys: one each for A, B and C; those of what is stored are ignored. below: v of each weight, or none.
void lowrank(std::vector<Tensor> weights, std::vector<Tensor> out, std::vector<Tensor> left, std::vector<Tensor> right,
             std::vector<Tensor> core, Tensor keys, Tensor coefficient, Tensor decay,
             std::optional<Tensor> rounding_key, std::vector<int64_t> tensor_ids, std::vector<int64_t> slices,
             int64_t rank, std::string core_kind, std::vector<Tensor> below, std::optional<Tensor> e) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    check_cpu(coefficient, ScalarType::Float, "coefficient");
    check_cpu(decay, ScalarType::Float, "decay");
    const uint64_t* const rounding = parse_rounding_keys(rounding_key);
    const size_t count = out.size();
    const auto one_or_all = [&](const Tensor& t) { return t.numel() == 1 || t.numel() == int64_t(count); };
    STD_TORCH_CHECK(keys.numel() == 3 && one_or_all(coefficient) && one_or_all(decay) && rank > 0,
                    "keys, coefficient, decay, rank: accepted: 3 keys, one value or one per tensor, rank >= 1");
    STD_TORCH_CHECK((left.empty() || left.size() == count) && (right.empty() || right.size() == count) &&
                        (core.empty() || core.size() == count),
                    "left, right, core: accepted: one per weight, or none (drawn from the key)");
    const Core kind = parse_core(core_kind);
    STD_TORCH_CHECK((kind == Core::full || kind == Core::diagonal) == !core.empty(),
                    "core: accepted: tensors if core_kind is diagonal or full, else none");
    STD_TORCH_CHECK(below.empty() || (below.size() == count && kind == Core::diagonal && e.has_value()),
                    "below: accepted: one per weight, with e and a diagonal core, or none");
    if (e.has_value()) check_cpu(*e, ScalarType::Float, "e");
    STD_TORCH_CHECK(!e.has_value() || one_or_all(*e), "e: accepted: one value or one per tensor");
    const float* es = e.has_value() ? (const float*)e->const_data_ptr() : nullptr;
    const DType dtype = parse_dtype(out[0]);
    const std::vector<Piece> pieces = make_pieces(weights, out, tensor_ids, slices, dtype);
    const uint64_t* key = (const uint64_t*)keys.const_data_ptr();
    const float* coefficients = (const float*)coefficient.const_data_ptr();
    const float* decays = (const float*)decay.const_data_ptr();
    std::vector<PackedWeight> packed(count);
    for (size_t t = 0; t < count; ++t) {
        const Piece& p = pieces[t];
        STD_TORCH_CHECK((left.empty() || left[t].numel() == p.rows * rank) &&
                            (right.empty() || right[t].numel() == p.cols * rank) &&
                            (core.empty() || core[t].numel() == (kind == Core::full ? rank * rank : rank)),
                        "left, right, core: accepted: (m, rank), (n, rank), (rank,) or (rank, rank)");
        STD_TORCH_CHECK(core.empty() || (core[t].is_cpu() && core[t].is_contiguous()),
                        "core: accepted: contiguous CPU tensors");
        STD_TORCH_CHECK(below.empty() || (below[t].numel() == rank && below[t].is_cpu() && below[t].is_contiguous()),
                        "below: accepted: contiguous CPU tensors (rank,)");
        packed[t].piece = p;
        // A shard that begins at row i and column j of the unsharded weight takes A from row i on, and B from row j on.
        packed[t].a = make_factor(left, t, p.base / p.row_stride * rank, p.tensor_id, key[0]);
        packed[t].b = make_factor(right, t, p.base % p.row_stride * rank, p.tensor_id, key[1]);
        packed[t].pass = {.dtype = dtype,
                          .piece = p,
                          .rank = rank,
                          .coefficient = coefficients[coefficient.numel() == 1 ? 0 : t],
                          .decay = decays[decay.numel() == 1 ? 0 : t],
                          .rounding_key = rounding,
                          .e = es ? es[e->numel() == 1 ? 0 : t] : 0.0f};
    }
    const Kernels& k = kernels();
    const bool pairs = k.pairs && dtype == DType::bf16 && below.empty();
    const Packer packer(dtype, rank, kind, pairs), float_packer(dtype, rank, kind, false);

    // The weights of a batch share each parallel region. This limit keeps the packed factors of a batch to some tens of
    // MB, except where a single weight takes more.
    constexpr int64_t kBatchFloats = 8 << 20;
    for (size_t begin = 0; begin < count;) {
        size_t end = begin;
        for (int64_t floats = 0; end < count && (end == begin || floats < kBatchFloats); ++end)
            floats += (pieces[end].rows + pieces[end].cols) * rank;
        torch::stable::parallel_for(int64_t(begin), int64_t(end), 1, [&](int64_t t, int64_t stop) {
            for (; t < stop; ++t) {
                PackedWeight& w = packed[size_t(t)];
                w.core = pack_core(kind, core, size_t(t), rank, w.piece.tensor_id, key[2]);
                if (!below.empty()) w.below = pack_core(Core::diagonal, below, size_t(t), rank, 0, 0);
                packer.allocate(w);
            }
        });
        parallel_for_items(
            end - begin, 1, [&](size_t i) { return packer.item_count(packed[begin + i]); },
            [&](size_t i, int64_t first, int64_t last) {
                for (; first < last; ++first) packer.pack_item(packed[begin + i], first);
            });
        for (size_t t = begin; t < end; ++t) {
            PackedWeight& w = packed[t];
            w.pass.pairs = pairs && packer.pairs_are_exact(w);
            if (pairs && !w.pass.pairs) {  // too small or too large for pairs: floats, packed serially, as this is rare
                float_packer.allocate(w);
                for (int64_t item = 0; item < float_packer.item_count(w); ++item) float_packer.pack_item(w, item);
            }
            w.pass.left = w.left.data();
            w.pass.right = w.right.data();
            w.pass.below_left = w.below.empty() ? nullptr : w.below_left.data();
            w.pass.below_right = w.below_right.data();
        }
        constexpr int64_t kRows = 24;  // rows of W in an item: a multiple of every tile's height
        parallel_for_items(
            end - begin, 2,
            [&](size_t i) {
                const Piece& p = pieces[begin + i];
                return p.cols ? (p.rows + kRows - 1) / kRows : 0;
            },
            [&](size_t i, int64_t first, int64_t last) {
                k.lowrank(packed[begin + i].pass, first * kRows, std::min(last * kRows, pieces[begin + i].rows));
            });
        for (; begin < end; ++begin) packed[begin] = {};  // frees the batch's factors
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("lowrank(Tensor[] weights, Tensor(a!)[] out, Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, "
          "Tensor coefficient, Tensor decay, Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, "
          "str core_kind, Tensor[] below, Tensor? e) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("lowrank", TORCH_BOX(&lowrank)); }
