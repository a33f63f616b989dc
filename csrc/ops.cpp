// The extension's ops on the LibTorch stable ABI: argument checks, work split over torch's own thread pool.
// The Python side has checked with better messages; what is checked here keeps memory safe whoever calls.
#include "pieces.h"

namespace {

using namespace pgap;

void dense(std::vector<Tensor> in, std::vector<Tensor> out, bool in_place, Tensor keys, Tensor coefficients, Tensor decay,
           std::optional<Tensor> rounding_keys, std::vector<int64_t> stages, std::vector<int64_t> tensor_ids,
           std::vector<int64_t> slices, std::string distribution) {
    if (out.empty()) return;
    check_cpu(keys, ScalarType::Long, "keys");
    const int64_t count = int64_t(out.size()), stage_count = int64_t(stages.size());
    int64_t draws = 0;
    for (int64_t n : stages) {
        STD_TORCH_CHECK(n >= 0, "stages: accepted: draws per stage");
        draws += n;
    }
    STD_TORCH_CHECK(draws == keys.numel(), "keys: accepted: one per draw of the stages");
    const std::vector<float> a = table_of(coefficients, draws, count, "coefficients");
    const std::vector<float> d = table_of(decay, stage_count, count, "decay");
    const DType dtype = dtype_of(out[0]);
    const DensePass pass = {
        dtype, {distribution_of(distribution), draws, count, (const uint64_t*)keys.const_data_ptr(), a.data()},
        stage_count, stages.data(), d.data(), rounding_keys_of(rounding_keys, stage_count)};
    std::vector<Piece> pieces = pieces_of(in, out, tensor_ids, slices, dtype);
    constexpr int64_t kLarge = 32 << 20;  // bytes; a smaller tensor may be read from a cache by whoever is next
    for (Piece& p : pieces) {
        if (in_place) p.in = p.out, p.ld_in = p.ld_out;
        else p.stream = p.rows * p.cols * itemsize(dtype) > kLarge;
    }
    pieces = regrouped(pieces, dtype);
    for_each_group(pieces, [&](size_t i, int64_t begin, int64_t end) { kernels().dense(pass, pieces[i], begin, end); });
}

// ---- lists of tensors ------------------------------------------------------------------------------------------

// Whether a list is plainly fit for a pass that writes it: contiguous rows on one device, one tensor behind the other,
// and if `alike` of one dtype. False only means that Python is to look closer, and to say what is wrong.
bool plain(std::vector<Tensor> tensors, bool alike) {
    struct Kind { int32_t dtype, device, index, layout; };
    const auto kind_of = [](const Tensor& t) {
        Kind kind;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &kind.dtype));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &kind.device));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &kind.index));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &kind.layout));
        return kind;
    };
    if (tensors.empty()) return false;
    const Kind first = kind_of(tensors[0]);
    std::vector<std::pair<uintptr_t, uintptr_t>> extents;
    extents.reserve(tensors.size());
    for (const Tensor& t : tensors) {
        const Kind kind = kind_of(t);
        if (kind.layout != aoti_torch_layout_strided() || kind.device != first.device || kind.index != first.index ||
            (alike && kind.dtype != first.dtype))
            return false;
        const std::optional<Rows> rows = find_rows(t);
        if (!rows) return false;
        if (rows->rows * rows->cols == 0) continue;
        const uintptr_t begin = (uintptr_t)t.const_data_ptr(), size = aoti_torch_dtype_element_size(kind.dtype);
        extents.emplace_back(begin, begin + uintptr_t((rows->rows - 1) * rows->ld + rows->cols) * size);
    }
    std::sort(extents.begin(), extents.end());
    for (size_t i = 1; i < extents.size(); ++i)
        if (extents[i - 1].second > extents[i].first) return false;
    return true;
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

// The build in use, then all that this CPU runs, best first.
std::string isa() {
    std::string names = kernels().name;
    for (int64_t i = 0; build(i); ++i) names += std::string(",") + build(i)->name;
    return names;
}
void use_isa(std::string name) { use(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(pgap_kernels_cpu, m) {
    m.def("dense(Tensor[] weights, Tensor(a!)[] out, bool in_place, Tensor keys, Tensor coefficients, Tensor decay, "
          "Tensor? rounding_keys, int[] stages, int[] tensor_ids, int[] slices, str distribution) -> ()");
    m.def("plain(Tensor[] tensors, bool alike) -> bool");
    m.def("box_muller(Tensor a, Tensor b, Tensor(a!) even, Tensor(b!) odd) -> ()");
    m.def("isa() -> str");
    m.def("use_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("dense", TORCH_BOX(&dense));
    m.impl("plain", TORCH_BOX(&plain));
    m.impl("box_muller", TORCH_BOX(&box_muller));
    m.impl("isa", TORCH_BOX(&isa));
    m.impl("use_isa", TORCH_BOX(&use_isa));
}
