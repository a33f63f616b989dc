// The op of forward.inl: y <- round(y + x F_in M F_out^T), with F_in = right, M = core^T, F_out = left (y = x W^T), or
// transposed F_in = left, M = core, F_out = right (y = x W; an embedding's x is a list of row indices).
#include <memory>

#include "pieces.h"

namespace {

using namespace pgap;

struct Factor {
    DType dtype;
    const void* data;
    int64_t rows, rank;
};

// A call's arguments, checked. The pass points into them, and to `indices` here.
struct ForwardCall {
    ForwardPass pass;
    Factor factor_in, factor_out;
    int64_t tokens;
    std::vector<const float*> cores;  // each for an equal share of the tokens, in order
    std::vector<int64_t> indices;
};

// ---- checks -----------------------------------------------------------------------------------------------------

// None unless it is float32, or of the outputs' dtype.
std::optional<Factor> try_parse_factor(const Tensor& t, DType outputs_type) {
    const std::optional<DType> dtype = try_parse_dtype(t);
    if (!t.is_cpu() || !dtype || (*dtype != DType::f32 && *dtype != outputs_type) || t.dim() != 2 || !t.is_contiguous())
        return std::nullopt;
    const Factor f = {.dtype = *dtype, .data = t.const_data_ptr(), .rows = t.size(0), .rank = t.size(1)};
    if (f.rank < 1 || f.rank > kForwardMaxRank) return std::nullopt;
    return f;
}

// Indices as int64, each checked to be a row of the factor, since the kernel reads that row.
std::vector<int64_t> parse_indices(const Tensor& t, int64_t rows) {
    const bool wide = t.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(t.is_contiguous() && (wide || t.scalar_type() == ScalarType::Int),
                    "inputs: accepted: contiguous float32, bfloat16, float16, or row indices of int64 or int32");
    const void* data = t.const_data_ptr();
    std::vector<int64_t> indices(size_t(t.numel()));
    for (size_t i = 0; i < indices.size(); ++i) {
        indices[i] = wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
        STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < rows, "inputs: got row index ", indices[i],
                        "; accepted: 0 to ", rows - 1);
    }
    return indices;
}

bool overlaps(const Tensor& y, const void* other, int64_t bytes) {
    const char *begin = (const char*)y.const_data_ptr(), *data = (const char*)other;
    return data < begin + y.numel() * itemsize(parse_dtype(y)) && begin < data + bytes;
}

// Nothing is written before all checks have passed.
ForwardCall parse_arguments(const Tensor& outputs, const Tensor& inputs, const Tensor& left, const Tensor& right,
                            const std::vector<Tensor>& cores, bool transposed) {
    ForwardCall call = {};
    ForwardPass& pass = call.pass;
    STD_TORCH_CHECK(cores.size() == 1 || cores.size() == 2, "cores: accepted: one or two");
    const int64_t dim = outputs.dim(), parts = int64_t(cores.size());
    const std::optional<DType> outputs_type = try_parse_dtype(outputs);
    STD_TORCH_CHECK(outputs.is_cpu() && outputs_type && dim >= 2 && outputs.is_contiguous(),
                    "outputs: accepted: contiguous CPU rows of float32, bfloat16, float16");
    const std::optional<Factor> a = try_parse_factor(left, *outputs_type), b = try_parse_factor(right, *outputs_type);
    STD_TORCH_CHECK(a && b && a->rank == b->rank,
                    "left, right: accepted: contiguous CPU (rows, rank <= 512) of one rank, float32 or outputs' dtype");
    call.factor_in = transposed ? *a : *b;
    call.factor_out = transposed ? *b : *a;
    call.tokens = 1;
    for (int64_t i = 0; i < dim - 1; ++i) call.tokens *= outputs.size(i);
    STD_TORCH_CHECK(outputs.size(dim - 1) == call.factor_out.rows, "outputs: accepted: a column per row of the factor");
    STD_TORCH_CHECK(outputs.size(0) % parts == 0, "cores: accepted: two for an even number of rows");
    const bool has_indices = transposed && inputs.dim() == dim - 1;
    STD_TORCH_CHECK(inputs.is_cpu() &&
                        (has_indices || (inputs.dim() == dim && inputs.size(dim - 1) == call.factor_in.rows)),
                    "inputs: accepted: a CPU tensor of outputs' rows, as wide as a factor has rows, or of row indices");
    for (int64_t i = 0; i < dim - 1; ++i)
        STD_TORCH_CHECK(inputs.size(i) == outputs.size(i), "inputs: accepted: as many rows as outputs");
    for (const Factor& f : {*a, *b})
        STD_TORCH_CHECK(!overlaps(outputs, f.data, f.rows * f.rank * itemsize(f.dtype)),
                        "left, right: accepted: factors that share no memory with outputs");
    pass = {.factor_in_type = call.factor_in.dtype,
            .outputs_type = *outputs_type,
            .in_features = call.factor_in.rows,
            .out_features = call.factor_out.rows,
            .rank = a->rank,
            .padded_rank = (a->rank + 7) / 8 * 8,
            .factor_in = call.factor_in.data};
    if (has_indices) {
        call.indices = parse_indices(inputs, call.factor_in.rows);
        pass.indices = call.indices.data();
    } else {
        const bool rows = dim == 2 && (pass.in_features < 2 || inputs.stride(1) == 1);
        const std::optional<DType> inputs_type = try_parse_dtype(inputs);
        STD_TORCH_CHECK(inputs_type && (rows || inputs.is_contiguous()),
                        "inputs: accepted: contiguous rows of float32, bfloat16, float16");
        pass.inputs_type = *inputs_type;
        pass.inputs = inputs.const_data_ptr();
        pass.ld_inputs = rows ? inputs.stride(0) : pass.in_features;
        const int64_t span = ((call.tokens - 1) * pass.ld_inputs + pass.in_features) * itemsize(pass.inputs_type);
        STD_TORCH_CHECK(call.tokens == 0 || pass.in_features == 0 || !overlaps(outputs, pass.inputs, span),
                        "inputs: accepted: inputs that share no memory with outputs");
    }
    for (const Tensor& core : cores) {
        STD_TORCH_CHECK(core.is_cpu() && core.scalar_type() == ScalarType::Float && core.dim() == 2 &&
                            core.size(0) == pass.rank && core.size(1) == pass.rank && core.is_contiguous(),
                        "cores: accepted: contiguous CPU (rank, rank) of float32");
        call.cores.push_back((const float*)core.const_data_ptr());
    }
    return call;
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Floats aligned to a cache line, not initialised: packing writes all of them, and zeroing would cost as much again.
struct Buffer {
    std::unique_ptr<float[]> memory;
    float* data;
    explicit Buffer(int64_t count) : memory(new float[size_t(count) + 16]) {
        data = (float*)((uintptr_t(memory.get()) + 63) / 64 * 64);
    }
};

// out[k][i] = in[i][k]
void transpose(const float* in, int64_t rows, int64_t columns, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; ++k) out[k * ld_out + i] = in[i * ld_in + k];
}

// Rows begin .. end - 1 of a factor as float32, ld apart.
void convert_rows(const Factor& f, int64_t begin, int64_t end, float* out, int64_t ld) {
    const char* in = (const char*)f.data;
    const int64_t size = f.rank * itemsize(f.dtype);
    if (ld == f.rank) return kernels().to_float(f.dtype, in + begin * size, out, (end - begin) * f.rank);
    for (int64_t row = begin; row < end; ++row, out += ld) kernels().to_float(f.dtype, in + row * size, out, f.rank);
}

// A panel of F_out^T: rows begin .. begin + panel - 1 of F_out as columns, with zeros past the last.
void pack_out_panel(const Factor& f, int64_t begin, int64_t panel, float* to) {
    const int64_t rows = std::min(panel, f.rows - begin);
    if (rows < panel) std::fill(to, to + panel * f.rank, 0.0f);
    if (f.dtype == DType::f32)
        return transpose((const float*)f.data + begin * f.rank, rows, f.rank, f.rank, to, panel);
    std::vector<float> converted(size_t(rows * f.rank));
    convert_rows(f, begin, begin + rows, converted.data(), f.rank);
    transpose(converted.data(), rows, f.rank, f.rank, to, panel);
}

// Rows begin .. end - 1 of F_in, each followed by zeros.
void pack_in_rows(const Factor& f, int64_t begin, int64_t end, int64_t padded_rank, float* to) {
    if (padded_rank > f.rank) std::fill(to, to + (end - begin) * padded_rank, 0.0f);
    convert_rows(f, begin, end, to, padded_rank);
}

// M = core, or core^T, each row followed by zeros.
void pack_core(const float* core, int64_t rank, int64_t padded_rank, bool transposed, float* to) {
    std::fill(to, to + rank * padded_rank, 0.0f);
    if (!transposed) return transpose(core, rank, rank, rank, to, padded_rank);
    for (int64_t k = 0; k < rank; ++k) std::copy(core + k * rank, core + (k + 1) * rank, to + k * padded_rank);
}

// ---- the op -----------------------------------------------------------------------------------------------------

void forward(Tensor outputs, Tensor inputs, Tensor left, Tensor right, std::vector<Tensor> cores, bool transposed) {
    ForwardCall call = parse_arguments(outputs, inputs, left, right, cores, transposed);
    if (outputs.numel() == 0 || call.factor_in.rows == 0) return;
    ForwardPass& pass = call.pass;
    pass.outputs = outputs.mutable_data_ptr();
    const Factor &factor_in = call.factor_in, &factor_out = call.factor_out;
    const int64_t rank = pass.rank, padded_rank = pass.padded_rank, parts = int64_t(call.cores.size());
    const int64_t panel = kernels().forward_panel;

    // F_in needs no packing if its rows are float32 and of padded size. With indices the kernel converts rows itself.
    const bool in_as_given = pass.indices || (factor_in.dtype == DType::f32 && padded_rank == rank);
    const int64_t out_items = (factor_out.rows + panel - 1) / panel;
    const int64_t in_items = in_as_given ? 0 : (factor_in.rows + panel - 1) / panel;
    const Buffer packed_out(out_items * panel * rank), packed_in(in_items * panel * padded_rank);
    const Buffer packed_cores(parts * rank * padded_rank);
    for (int64_t i = 0; i < parts; ++i)
        pack_core(call.cores[size_t(i)], rank, padded_rank, transposed, packed_cores.data + i * rank * padded_rank);
    constexpr int64_t kPackFloats = 1 << 16;  // worth starting a thread for
    const auto pack = [&](int64_t item, int64_t end) {
        for (; item < end; ++item) {
            if (item < out_items) {
                pack_out_panel(factor_out, item * panel, panel, packed_out.data + item * panel * rank);
            } else {
                const int64_t begin = (item - out_items) * panel;
                pack_in_rows(factor_in, begin, std::min(begin + panel, factor_in.rows), padded_rank,
                             packed_in.data + begin * padded_rank);
            }
        }
    };
    torch::stable::parallel_for(0, out_items + in_items, std::max<int64_t>(kPackFloats / (panel * rank), 1), pack);
    if (!in_as_given) pass.factor_in = packed_in.data;
    pass.factor_out = packed_out.data;

    // Threads share units of 4 tokens, the height of the smallest tile; a share may span the tokens of both cores.
    constexpr int64_t kFour = 4;
    constexpr int64_t kProducts = 1 << 18;  // worth starting a thread for
    const int64_t part = call.tokens / parts, fours = (part + kFour - 1) / kFour;
    const int64_t products = kFour * rank * (pass.out_features + (pass.indices ? rank : pass.in_features));
    const auto apply = [&](int64_t begin, int64_t end) {
        const Buffer scratch(kForwardScratch);
        for (int64_t i = begin / fours; begin < end; ++i) {
            const int64_t start = i * fours, stop = std::min(end, start + fours);
            kernels().forward(pass, packed_cores.data + i * rank * padded_rank, i * part + (begin - start) * kFour,
                              i * part + std::min((stop - start) * kFour, part), scratch.data);
            begin = stop;
        }
    };
    torch::stable::parallel_for(0, parts * fours, std::max<int64_t>(kProducts / products, 1), apply);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("forward(Tensor(a!) outputs, Tensor inputs, Tensor left, Tensor right, Tensor[] cores, bool transposed) "
          "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("forward", TORCH_BOX(&forward)); }
