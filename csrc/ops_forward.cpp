// The op of forward.inl: y <- round(y + x F_in M F_out^T), with F_in = right, M = core^T, F_out = left (y = x W^T), or
// transposed F_in = left, M = core, F_out = right (y = x W; an embedding's x is a list of row indices).
//
// The rows are split into equal slices, each of which sees a direction of its own: a core or a coefficient each, and
// factors that all share, or one each, stored or drawn from a key.
#include <memory>

#include "factors.h"

namespace {

using namespace pgap;

// F_in or F_out of every slice, (rows, rank); one if all slices share it.
struct SliceFactors {
    DType dtype;
    int64_t rows;
    std::vector<const void*> data;
    bool drawn;
    int64_t base;                // drawn: logical index of the first element
    std::vector<uint64_t> keys;  // drawn: one for each slice
};

// A call's arguments, checked. The pass of a slice points into them, and to `indices` here.
struct ForwardCall {
    ForwardPass pass;
    SliceFactors in, out;
    int64_t tokens, slices;
    uint32_t tensor_id;
    std::vector<const float*> cores;  // of each slice, or none
    std::vector<float> coefficients;  // of each slice, if there are no cores
    std::vector<int64_t> indices;
};

// ---- checks -----------------------------------------------------------------------------------------------------

bool overlaps(const Tensor& y, const void* other, int64_t bytes) {
    const char *begin = (const char*)y.const_data_ptr(), *data = (const char*)other;
    return data < begin + y.numel() * itemsize(parse_dtype(y)) && begin < data + bytes;
}

SliceFactors parse_factors(const std::vector<Tensor>& stored, const Tensor& outputs, int64_t rows, int64_t rank, int64_t slices) {
    const size_t count = stored.size();
    STD_TORCH_CHECK(count == 0 || count == 1 || count == size_t(slices),
                    "left, right: accepted: one factor, one for each slice, or none where they are drawn");
    SliceFactors side = {.dtype = DType::f32, .rows = rows, .drawn = count == 0};
    for (const Tensor& t : stored) {
        const std::optional<DType> dtype = try_parse_dtype(t);
        STD_TORCH_CHECK(t.is_cpu() && dtype && (*dtype == DType::f32 || *dtype == parse_dtype(outputs)) &&
                            *dtype == parse_dtype(stored[0]) && t.dim() == 2 && t.is_contiguous() &&
                            t.size(0) == rows && t.size(1) == rank,
                        "left, right: accepted: contiguous CPU (rows, rank) of one dtype, float32 or outputs'");
        side.dtype = *dtype;
        side.data.push_back(t.const_data_ptr());
        STD_TORCH_CHECK(!overlaps(outputs, side.data.back(), rows * rank * itemsize(*dtype)),
                        "left, right: accepted: factors that share no memory with outputs");
    }
    return side;
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

// Nothing is written before all checks have passed.
ForwardCall parse_arguments(const Tensor& outputs, const Tensor& inputs, const std::vector<Tensor>& left,
                            const std::vector<Tensor>& right, const std::vector<Tensor>& cores,
                            const std::vector<Tensor>& coefficients, const std::vector<Tensor>& keys,
                            const std::vector<int64_t>& shape, int64_t rank, int64_t tensor_id,
                            const std::vector<int64_t>& span, bool transposed) {
    ForwardCall call = {};
    ForwardPass& pass = call.pass;
    const int64_t dim = outputs.dim();
    const std::optional<DType> outputs_type = try_parse_dtype(outputs);
    STD_TORCH_CHECK(outputs.is_cpu() && outputs_type && dim >= 2 && outputs.is_contiguous(),
                    "outputs: accepted: contiguous CPU rows of float32, bfloat16, float16");
    for (const Tensor& c : coefficients) {
        check_cpu(c, ScalarType::Float, "coefficients");
        STD_TORCH_CHECK(c.numel() == 1, "coefficients: accepted: one element for each slice");
        call.coefficients.push_back(*(const float*)c.const_data_ptr());
    }
    call.slices = int64_t(cores.empty() ? coefficients.size() : cores.size());
    STD_TORCH_CHECK(call.slices > 0 && outputs.size(0) % call.slices == 0,
                    "cores, coefficients: accepted: a number of slices that divides the rows");
    STD_TORCH_CHECK(rank >= 1 && rank <= kForwardMaxRank && shape.size() == 2 && shape[0] >= 0 && shape[1] >= 0,
                    "rank, shape: accepted: 1 <= rank <= 512, (m, n)");
    SliceFactors a = parse_factors(left, outputs, shape[0], rank, call.slices);
    SliceFactors b = parse_factors(right, outputs, shape[1], rank, call.slices);
    if (a.drawn || b.drawn) {
        STD_TORCH_CHECK(keys.size() == size_t(call.slices) && (span.empty() || (span.size() == 2 && span[1] > 0)),
                        "keys, span: accepted: keys of A and B for each slice; (base, row stride) of a shard");
        for (const Tensor& pair : keys) {
            check_cpu(pair, ScalarType::Long, "keys");
            STD_TORCH_CHECK(pair.numel() >= 2, "keys: accepted: those of A and B for each slice");
            const uint64_t* key = (const uint64_t*)pair.const_data_ptr();
            a.keys.push_back(key[0]);
            b.keys.push_back(key[1]);
        }
        // A shard's first row and column in the unsharded weight are those of its part of A and B.
        a.base = span.empty() ? 0 : span[0] / span[1] * rank;
        b.base = span.empty() ? 0 : span[0] % span[1] * rank;
    }
    call.in = transposed ? a : b;
    call.out = transposed ? b : a;
    call.tensor_id = uint32_t(tensor_id);
    call.tokens = 1;
    for (int64_t i = 0; i < dim - 1; ++i) call.tokens *= outputs.size(i);
    STD_TORCH_CHECK(outputs.size(dim - 1) == call.out.rows, "outputs: accepted: a column per row of the factor");
    const bool has_indices = transposed && inputs.dim() == dim - 1;
    STD_TORCH_CHECK(inputs.is_cpu() && (has_indices || (inputs.dim() == dim && inputs.size(dim - 1) == call.in.rows)),
                    "inputs: accepted: a CPU tensor of outputs' rows, as wide as a factor has rows, or of row indices");
    for (int64_t i = 0; i < dim - 1; ++i)
        STD_TORCH_CHECK(inputs.size(i) == outputs.size(i), "inputs: accepted: as many rows as outputs");
    pass = {.factor_in_type = call.in.dtype,
            .outputs_type = *outputs_type,
            .in_features = call.in.rows,
            .out_features = call.out.rows,
            .rank = rank,
            .padded_rank = (rank + 7) / 8 * 8};
    if (has_indices) {
        call.indices = parse_indices(inputs, call.in.rows);
        pass.indices = call.indices.data();
    } else {
        const bool rows = dim == 2 && (pass.in_features < 2 || inputs.stride(1) == 1);
        const std::optional<DType> inputs_type = try_parse_dtype(inputs);
        STD_TORCH_CHECK(inputs_type && (rows || inputs.is_contiguous()),
                        "inputs: accepted: contiguous rows of float32, bfloat16, float16");
        pass.inputs_type = *inputs_type;
        pass.inputs = inputs.const_data_ptr();
        pass.ld_inputs = rows ? inputs.stride(0) : pass.in_features;
        const int64_t bytes = ((call.tokens - 1) * pass.ld_inputs + pass.in_features) * itemsize(pass.inputs_type);
        STD_TORCH_CHECK(call.tokens == 0 || pass.in_features == 0 || !overlaps(outputs, pass.inputs, bytes),
                        "inputs: accepted: inputs that share no memory with outputs");
    }
    for (const Tensor& core : cores) {
        STD_TORCH_CHECK(core.is_cpu() && core.scalar_type() == ScalarType::Float && core.dim() == 2 &&
                            core.size(0) == rank && core.size(1) == rank && core.is_contiguous(),
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

// Draws the factors that are drawn, for the packing to find them as if they were stored.
std::unique_ptr<Buffer> draw_factors(SliceFactors& side, int64_t rank, int64_t slices, uint32_t tensor_id) {
    if (!side.drawn) return nullptr;
    constexpr int64_t kChunk = 1 << 14;  // whole groups of noise, where the factor begins with one
    const int64_t size = side.rows * rank, chunks = (size + kChunk - 1) / kChunk;
    auto drawn = std::make_unique<Buffer>(slices * size);
    torch::stable::parallel_for(0, slices * chunks, 1, [&](int64_t item, int64_t end) {
        for (; item < end; ++item) {
            const int64_t slice = item / chunks, begin = item % chunks * kChunk;
            draw_normal(side.base + begin, std::min(kChunk, size - begin), tensor_id, side.keys[size_t(slice)],
                        drawn->data + slice * size + begin);
        }
    });
    for (int64_t i = 0; i < slices; ++i) side.data.push_back(drawn->data + i * size);
    return drawn;
}

// out[k][i] = in[i][k]
void transpose(const float* in, int64_t rows, int64_t columns, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; ++k) out[k * ld_out + i] = in[i * ld_in + k];
}

// Rows begin .. end - 1 of a factor as float32, ld apart.
void convert_rows(DType dtype, const void* factor, int64_t rank, int64_t begin, int64_t end, float* out, int64_t ld) {
    const int64_t size = rank * itemsize(dtype);
    const char* in = (const char*)factor + begin * size;
    if (ld == rank) return kernels().to_float(dtype, in, out, (end - begin) * rank);
    for (int64_t row = begin; row < end; ++row, out += ld, in += size) kernels().to_float(dtype, in, out, rank);
}

// A panel of F_out^T: rows begin .. begin + panel - 1 of F_out as columns, with zeros past the last.
void pack_out_panel(const SliceFactors& side, const void* factor, int64_t rank, int64_t begin, int64_t panel, float* to) {
    const int64_t rows = std::min(panel, side.rows - begin);
    if (rows < panel) std::fill(to, to + panel * rank, 0.0f);
    if (side.dtype == DType::f32)
        return transpose((const float*)factor + begin * rank, rows, rank, rank, to, panel);
    std::vector<float> converted(size_t(rows * rank));
    convert_rows(side.dtype, factor, rank, begin, begin + rows, converted.data(), rank);
    transpose(converted.data(), rows, rank, rank, to, panel);
}

// Rows begin .. end - 1 of F_in, each followed by zeros.
void pack_in_rows(const SliceFactors& side, const void* factor, int64_t rank, int64_t begin, int64_t end, int64_t padded_rank,
                  float* to) {
    if (padded_rank > rank) std::fill(to, to + (end - begin) * padded_rank, 0.0f);
    convert_rows(side.dtype, factor, rank, begin, end, to, padded_rank);
}

// M = core, or core^T, with zeros behind each row.
void pack_core(const float* core, int64_t rank, int64_t padded_rank, bool transposed, float* to) {
    std::fill(to, to + rank * padded_rank, 0.0f);
    if (!transposed) return transpose(core, rank, rank, rank, to, padded_rank);
    for (int64_t k = 0; k < rank; ++k) std::copy(core + k * rank, core + (k + 1) * rank, to + k * padded_rank);
}

// ---- the op -----------------------------------------------------------------------------------------------------

void forward(Tensor outputs, Tensor inputs, std::vector<Tensor> left, std::vector<Tensor> right,
             std::vector<Tensor> cores, std::vector<Tensor> coefficients, std::vector<Tensor> keys,
             std::vector<int64_t> shape, int64_t rank, int64_t tensor_id, std::vector<int64_t> span, bool transposed) {
    ForwardCall call = parse_arguments(outputs, inputs, left, right, cores, coefficients, keys, shape, rank, tensor_id,
                                       span, transposed);
    if (outputs.numel() == 0 || call.in.rows == 0) return;
    ForwardPass& pass = call.pass;
    pass.outputs = outputs.mutable_data_ptr();
    SliceFactors &in = call.in, &out = call.out;
    const int64_t padded_rank = pass.padded_rank, slices = call.slices, panel = kernels().forward_panel;
    const auto drawn_in = draw_factors(in, rank, slices, call.tensor_id);
    const auto drawn_out = draw_factors(out, rank, slices, call.tensor_id);

    // F_in needs no packing if its rows are float32 and of padded size. With indices the kernel converts rows itself.
    const bool in_as_given = pass.indices || (in.dtype == DType::f32 && padded_rank == rank);
    const int64_t in_count = int64_t(in.data.size()), out_count = int64_t(out.data.size());
    const int64_t in_items = in_as_given ? 0 : (in.rows + panel - 1) / panel, out_items = (out.rows + panel - 1) / panel;
    const int64_t in_size = in_as_given ? 0 : in.rows * padded_rank, out_size = out_items * panel * rank;
    const Buffer packed_in(in_count * in_size), packed_out(out_count * out_size);
    const Buffer packed_cores(int64_t(call.cores.size()) * rank * padded_rank);
    for (size_t i = 0; i < call.cores.size(); ++i)
        pack_core(call.cores[i], rank, padded_rank, transposed, packed_cores.data + int64_t(i) * rank * padded_rank);
    constexpr int64_t kPackFloats = 1 << 16;  // worth starting a thread for
    parallel_for_items(
        size_t(out_count + in_count), std::max<int64_t>(kPackFloats / (panel * rank), 1),
        [&](size_t factor) { return int64_t(factor) < out_count ? out_items : in_items; },
        [&](size_t factor, int64_t item, int64_t end) {
            for (; item < end; ++item) {
                const int64_t begin = item * panel, i = int64_t(factor) - out_count;
                if (i < 0)
                    pack_out_panel(out, out.data[factor], rank, begin, panel,
                                   packed_out.data + int64_t(factor) * out_size + item * panel * rank);
                else
                    pack_in_rows(in, in.data[size_t(i)], rank, begin, std::min(begin + panel, in.rows), padded_rank,
                                 packed_in.data + i * in_size + begin * padded_rank);
            }
        });
    std::vector<ForwardPass> passes(size_t(slices), pass);
    for (int64_t i = 0; i < slices; ++i) {
        ForwardPass& own = passes[size_t(i)];
        const int64_t in_factor = in_count == 1 ? 0 : i, out_factor = out_count == 1 ? 0 : i;
        own.factor_in = in_as_given ? in.data[size_t(in_factor)] : packed_in.data + in_factor * in_size;
        own.factor_out = packed_out.data + out_factor * out_size;
        own.core = call.cores.empty() ? nullptr : packed_cores.data + i * rank * padded_rank;
        own.coefficient = call.cores.empty() ? call.coefficients[size_t(i)] : 1.0f;
    }

    // Threads share units of 4 tokens, the height of the smallest tile; a share may span several slices.
    constexpr int64_t kTokenUnit = 4;
    constexpr int64_t kProducts = 1 << 18;  // worth starting a thread for
    const int64_t part = call.tokens / slices, fours = (part + kTokenUnit - 1) / kTokenUnit;
    const int64_t products = kTokenUnit * rank * (pass.out_features + (pass.indices ? rank : pass.in_features));
    const auto apply = [&](int64_t begin, int64_t end) {
        const Buffer scratch(kForwardScratch);
        for (int64_t i = begin / fours; begin < end; ++i) {
            const int64_t start = i * fours, stop = std::min(end, start + fours);
            kernels().forward(passes[size_t(i)], i * part + (begin - start) * kTokenUnit,
                              i * part + std::min((stop - start) * kTokenUnit, part), scratch.data);
            begin = stop;
        }
    };
    torch::stable::parallel_for(0, slices * fours, std::max<int64_t>(kProducts / products, 1), apply);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("forward(Tensor(a!) outputs, Tensor inputs, Tensor[] left, Tensor[] right, Tensor[] cores, "
          "Tensor[] coefficients, Tensor[] keys, int[] shape, int rank, int tensor_id, int[] span, bool transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("forward", TORCH_BOX(&forward)); }
