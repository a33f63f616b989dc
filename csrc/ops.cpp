// The extension, on the LibTorch stable ABI. These ops belong to no kernel family; the others are in ops_*.cpp.
#include "pieces.h"

namespace {

using namespace pgap;

// Fast path of Python's checks: true if the tensors are matrices with contiguous rows, on one device and, if `alike`,
// of one dtype, and no two of them overlap. False is inconclusive: Python then looks closer and says what is wrong, if
// anything.
bool is_disjoint_rows(std::vector<Tensor> tensors, bool alike) {
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
        const std::optional<Layout> layout = try_parse_layout(t);
        if (!layout) return false;
        if (layout->rows * layout->cols == 0) continue;
        const uintptr_t begin = (uintptr_t)t.const_data_ptr(), size = aoti_torch_dtype_element_size(kind.dtype);
        extents.emplace_back(begin, begin + uintptr_t((layout->rows - 1) * layout->ld + layout->cols) * size);
    }
    std::sort(extents.begin(), extents.end());
    for (size_t i = 1; i < extents.size(); ++i)
        if (extents[i - 1].second > extents[i].first) return false;
    return true;
}

// Box-Muller alone, for its error sweep.
void box_muller(Tensor a, Tensor b, Tensor even, Tensor odd) {
    check_cpu(a, ScalarType::Int, "a");
    check_cpu(b, ScalarType::Int, "b");
    check_cpu(even, ScalarType::Float, "even");
    check_cpu(odd, ScalarType::Float, "odd");
    const int64_t n = a.numel();
    STD_TORCH_CHECK(b.numel() == n && even.numel() == n && odd.numel() == n, "a, b, even, odd: accepted: one length");
    torch::stable::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
        kernels().box_muller((const uint32_t*)a.const_data_ptr() + begin, (const uint32_t*)b.const_data_ptr() + begin,
                             (float*)even.mutable_data_ptr() + begin, (float*)odd.mutable_data_ptr() + begin,
                             end - begin);
    });
}

// The instruction set in use, then all that this CPU supports, best first.
std::string isa() {
    std::string names = kernels().name;
    for (int64_t i = 0; supported_kernels(i); ++i) names += std::string(",") + supported_kernels(i)->name;
    return names;
}

void use_isa(std::string name) { select_isa(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(pgap_kernels_cpu, m) {
    m.def("is_disjoint_rows(Tensor[] tensors, bool alike) -> bool");
    m.def("box_muller(Tensor a, Tensor b, Tensor(a!) even, Tensor(b!) odd) -> ()");
    m.def("isa() -> str");
    m.def("use_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("is_disjoint_rows", TORCH_BOX(&is_disjoint_rows));
    m.impl("box_muller", TORCH_BOX(&box_muller));
    m.impl("isa", TORCH_BOX(&isa));
    m.impl("use_isa", TORCH_BOX(&use_isa));
}
