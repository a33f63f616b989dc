// low_rank: the factors of all weights are made ready in parallel, then all weights passed over.
#include "pieces.h"

#include <cmath>
#include <cstring>

namespace {

using namespace pgap;

enum class Core { none, diagonal, full, regenerated };

Core core_of(const std::string& name) {
    if (name == "none") return Core::none;
    if (name == "diagonal") return Core::diagonal;
    if (name == "full") return Core::full;
    STD_TORCH_CHECK(name == "regenerated", "core_kind: accepted: none, diagonal, full, regenerated");
    return Core::regenerated;
}

// A or B, rows of `rank` numbers: stored ones of a dtype, or normals of a key and tensor id from a number on.
struct Factor {
    DType dtype;
    const void* data;  // null: regenerated
    int64_t begin;
    uint32_t tensor_id;
    uint64_t key;
};

void regenerate(int64_t begin, int64_t count, uint32_t tensor_id, uint64_t key, float* out) {
    const float one = 1.0f, zero = 0.0f;
    const int64_t draws = 1;
    const DensePass pass = {DType::f32, {Distribution::normal, 1, 1, &key, &one}, 1, &draws, &zero, nullptr};
    Piece p = {};
    p.out = out, p.rows = 1, p.cols = p.ld_in = p.ld_out = p.row_stride = count, p.base = begin;
    p.tensor_id = tensor_id;
    if (count) kernels().dense(pass, p, first_group(p), end_group(p));
}

Factor factor_of(const std::vector<Tensor>& stored, size_t t, int64_t begin, uint32_t tensor_id, uint64_t key) {
    if (stored.empty()) return {DType::f32, nullptr, begin, tensor_id, key};
    STD_TORCH_CHECK(stored[t].is_cpu() && stored[t].is_contiguous(), "factors: accepted: contiguous CPU tensors");
    return {dtype_of(stored[t], "factors"), stored[t].const_data_ptr(), 0, 0, 0};
}

// `count` numbers from number `at` on, as float32: where they lie, or in `room`.
const float* numbers_of(const Factor& f, int64_t at, int64_t count, std::vector<float>& room) {
    if (f.data && f.dtype == DType::f32) return (const float*)f.data + at;
    room.resize(size_t(count));
    if (f.data) kernels().to_float(f.dtype, (const char*)f.data + at * itemsize(f.dtype), room.data(), count);
    else regenerate(f.begin + at, count, f.tensor_id, f.key, room.data());
    return room.data();
}

// A matrix of `depth` rows and `columns` columns, whose numbers lie these strides apart, as panels [depth][panel].
void pack(const float* from, int64_t depth, int64_t row_stride, int64_t columns, int64_t column_stride, float* panels) {
    const int64_t panel = kernels().right_panel;
    for (int64_t j = 0; j < columns; ++j) {
        float* to = panels + j / panel * panel * depth + j % panel;
        for (int64_t k = 0; k < depth; ++k) to[k * panel] = from[k * row_stride + j * column_stride];
    }
}

// CPUs that multiply pairs of bf16 take subnormal numbers for zero. True where no number, product or sum can be subnormal
// or overflow, so that pairs give the same bits as one product after the other.
struct Range {
    double least = 1.0, most = 0.0;
    void add(const float* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const double size = std::fabs(values[i]);
            if (!(size <= most)) most = size;  // NaN stays
            if (size != 0.0 && size < least) least = size;
        }
    }
    void add(const Range& other) {
        least = std::min(least, other.least);
        if (!(other.most <= most)) most = other.most;
    }
};
bool fit_pairs(const Range& a, const Range& b, int64_t rank) {
    return std::min(a.least, b.least) >= 0x1p-126 && a.least * b.least >= 0x1p-110 &&  // sums: multiples of 2^-126
           a.most * b.most * double(rank) <= 0x1p126;
}

// Rows of numbers that bf16 holds as rows of pairs; the last of an odd row has a zero. `pairs` may be `values`.
void pair_up(const float* values, int64_t rows, int64_t rank, float* pairs) {
    for (int64_t row = 0; row < rows; ++row, values += rank)
        for (int64_t k = 0; k < rank; k += 2) {
            uint32_t high, low = 0;
            std::memcpy(&high, values + k, 4);
            if (k + 1 < rank) std::memcpy(&low, values + k + 1, 4);
            high |= low >> 16;
            std::memcpy(pairs++, &high, 4);
        }
}

// What a pass over one weight needs beside it.
struct Work {
    Piece piece;
    Factor a, b;
    std::vector<float> core;  // in panels; diagonal: as it is
    std::vector<float> left, right;
    std::vector<Range> ranges;  // of every item of either side
    LowRankPass pass;
};

constexpr int64_t kLeftRows = 192;  // of an item; a multiple of every tile height
constexpr int64_t kRightPanels = 4;

class Preparation {
public:
    Preparation(DType dtype, int64_t rank, Core core, bool pairs) : dtype_(dtype), rank_(rank), core_(core), pairs_(pairs) {}

    int64_t depth() const { return pairs_ ? (rank_ + 1) / 2 : rank_; }
    int64_t left_items(const Work& w) const { return (w.piece.rows + kLeftRows - 1) / kLeftRows; }
    int64_t items(const Work& w) const {
        const int64_t columns = kRightPanels * kernels().right_panel;
        return w.piece.rows * w.piece.cols == 0 ? 0 : left_items(w) + (w.piece.cols + columns - 1) / columns;
    }
    void reserve(Work& w) const {
        const int64_t panel = kernels().right_panel, panels = (w.piece.cols + panel - 1) / panel;
        w.left.resize(size_t(w.piece.rows * depth()));
        w.right.assign(size_t(panels * panel * depth()), 0.0f);
        w.ranges.assign(size_t(items(w)), Range());
    }
    void make(Work& w, int64_t item) const {
        const int64_t left = left_items(w);
        if (item < left) make_left(w, item * kLeftRows, std::min((item + 1) * kLeftRows, w.piece.rows), w.ranges[size_t(item)]);
        else make_right(w, item - left, w.ranges[size_t(item)]);
    }
    bool fits(const Work& w) const {
        Range sides[2];
        for (size_t i = 0; i < w.ranges.size(); ++i) sides[int64_t(i) >= left_items(w)].add(w.ranges[i]);
        return fit_pairs(sides[0], sides[1], rank_);
    }

private:
    // Rounded to the weights' dtype where that has 16 bits, and then, where wanted, in pairs.
    void finish(std::vector<float>& rows, Range& range) const {
        const int64_t count = int64_t(rows.size());
        if (dtype_ != DType::f32) kernels().round_to(dtype_, rows.data(), count);
        if (!pairs_) return;
        range.add(rows.data(), count);
        pair_up(rows.data(), count / rank_, rank_, rows.data());
        rows.resize(size_t(count / rank_ * depth()));
    }
    // P = A C: by the same kernel, with C as the packed side.
    void make_left(Work& w, int64_t begin, int64_t end, Range& range) const {
        std::vector<float> room, p(size_t((end - begin) * rank_));
        const float* a = numbers_of(w.a, begin * rank_, (end - begin) * rank_, room);
        if (core_ == Core::none) {
            std::copy_n(a, p.size(), p.data());
        } else if (core_ == Core::diagonal) {
            for (size_t i = 0; i < p.size(); ++i) p[i] = a[i] * w.core[i % size_t(rank_)];
        } else {
            Piece small = {};
            small.out = p.data(), small.rows = end - begin, small.cols = small.ld_out = small.row_stride = rank_;
            kernels().low_rank({DType::f32, small, a, w.core.data(), rank_, 1.0f, 0.0f, nullptr, false}, 0, end - begin);
        }
        finish(p, range);
        std::copy(p.begin(), p.end(), w.left.begin() + begin * depth());
    }
    void make_right(Work& w, int64_t item, Range& range) const {
        const int64_t columns = kRightPanels * kernels().right_panel, begin = item * columns;
        const int64_t count = std::min(columns, w.piece.cols - begin) * rank_;
        std::vector<float> room;
        const float* b = numbers_of(w.b, begin * rank_, count, room);
        if (dtype_ != DType::f32) {
            if (b != room.data()) room.assign(b, b + count);
            finish(room, range);
            b = room.data();
        }
        pack(b, depth(), 1, count / rank_, depth(), w.right.data() + begin * depth());
    }

    DType dtype_;
    int64_t rank_;
    Core core_;
    bool pairs_;
};

// The core for P = A C, in panels.
std::vector<float> core_for(Core kind, const std::vector<Tensor>& stored, size_t t, int64_t rank, uint32_t tensor_id,
                            uint64_t key) {
    if (kind == Core::none) return {};
    std::vector<float> room;
    const int64_t count = kind == Core::diagonal ? rank : rank * rank;
    const float* c = numbers_of(factor_of(stored, t, 0, tensor_id, key), 0, count, room);
    if (kind == Core::diagonal) return std::vector<float>(c, c + count);
    const int64_t panel = kernels().right_panel;
    std::vector<float> packed(size_t((rank + panel - 1) / panel * panel * rank), 0.0f);
    pack(c, rank, rank, rank, 1, packed.data());
    return packed;
}

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
    const Core kind = core_of(core_kind);
    STD_TORCH_CHECK((kind == Core::full || kind == Core::diagonal) == !core.empty(),
                    "core: accepted: tensors for a diagonal or full core only");
    const DType dtype = dtype_of(out[0]);
    const std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    const uint64_t* key = (const uint64_t*)keys.const_data_ptr();
    const float* a = (const float*)coefficient.const_data_ptr();
    const float* d = (const float*)decay.const_data_ptr();
    std::vector<Work> works(count);
    for (size_t t = 0; t < count; ++t) {
        const Piece& p = pieces[t];
        STD_TORCH_CHECK((left.empty() || left[t].numel() == p.rows * rank) &&
                            (right.empty() || right[t].numel() == p.cols * rank) &&
                            (core.empty() || core[t].numel() == (kind == Core::full ? rank * rank : rank)),
                        "left, right, core: accepted: (m, rank), (n, rank), (rank,) or (rank, rank)");
        STD_TORCH_CHECK(core.empty() || (core[t].is_cpu() && core[t].is_contiguous()),
                        "factors: accepted: contiguous CPU tensors");
        works[t].piece = p;
        works[t].a = factor_of(left, t, p.base / p.row_stride * rank, p.tensor_id, key[0]);
        works[t].b = factor_of(right, t, p.base % p.row_stride * rank, p.tensor_id, key[1]);
        works[t].pass = {dtype, p, nullptr, nullptr, rank, a[coefficient.numel() == 1 ? 0 : t],
                         d[decay.numel() == 1 ? 0 : t], rounding, false};
    }
    const Kernels& k = kernels();
    const bool pairs = k.pairs && dtype == DType::bf16;
    const Preparation usual(dtype, rank, kind, pairs), single(dtype, rank, kind, false);

    // Batches of tensors share the parallel regions; the packed factors of a batch stay within some tens of MB.
    constexpr int64_t kBatchFloats = 8 << 20;
    for (size_t begin = 0; begin < count;) {
        size_t end = begin;
        for (int64_t floats = 0; end < count && (end == begin || floats < kBatchFloats); ++end)
            floats += (pieces[end].rows + pieces[end].cols) * rank;
        torch::stable::parallel_for(int64_t(begin), int64_t(end), 1, [&](int64_t t, int64_t stop) {
            for (; t < stop; ++t) {
                Work& w = works[size_t(t)];
                w.core = core_for(kind, core, size_t(t), rank, w.piece.tensor_id, key[2]);
                usual.reserve(w);
            }
        });
        for_each_run(
            end - begin, 1, [&](size_t i) { return usual.items(works[begin + i]); },
            [&](size_t i, int64_t first, int64_t last) {
                for (; first < last; ++first) usual.make(works[begin + i], first);
            });
        for (size_t t = begin; t < end; ++t) {
            Work& w = works[t];
            w.pass.pairs = pairs && usual.fits(w);
            if (pairs && !w.pass.pairs) {  // seldom
                single.reserve(w);
                for (int64_t item = 0; item < single.items(w); ++item) single.make(w, item);
            }
            w.pass.left = w.left.data(), w.pass.right = w.right.data();
        }
        constexpr int64_t kRows = 24;  // a multiple of every tile height
        for_each_run(
            end - begin, 2,
            [&](size_t i) {
                const Piece& p = pieces[begin + i];
                return p.cols ? (p.rows + kRows - 1) / kRows : 0;
            },
            [&](size_t i, int64_t first, int64_t last) {
                k.low_rank(works[begin + i].pass, first * kRows, std::min(last * kRows, pieces[begin + i].rows));
            });
        for (; begin < end; ++begin) works[begin] = {};
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("low_rank(Tensor[] weights, Tensor(a!)[] out, Tensor[] left, Tensor[] right, Tensor[] core, Tensor keys, "
          "Tensor coefficient, Tensor decay, Tensor? rounding_key, int[] tensor_ids, int[] slices, int rank, "
          "str core_kind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("low_rank", TORCH_BOX(&low_rank));
}
