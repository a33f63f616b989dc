// The op of forward.inl: y <- y + x F_in M F_out^T. As in ops.cpp, checks here keep memory safe.
#include <memory>

#include "pieces.h"

namespace {

using namespace pgap;

struct Factor { DType dtype; const void* data; int64_t rows, rank; };

// The pass that arguments ask for; what the fields point to lives in them and in here.
struct Forward {
    ForwardPass pass;
    Factor into, out_of;
    int64_t tokens, parts;
    std::vector<int64_t> numbers;
};

bool dtype_if(const Tensor& t, DType& dtype) {
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half) return false;
    dtype = dtype_of(t);
    return true;
}

bool factor_if(const Tensor& t, DType other, Factor& f) {
    if (!t.is_cpu() || !dtype_if(t, f.dtype) || (f.dtype != DType::f32 && f.dtype != other) || t.dim() != 2 ||
        !t.is_contiguous())
        return false;
    f.data = t.const_data_ptr(), f.rows = t.size(0), f.rank = t.size(1);
    return f.rank >= 1 && f.rank <= kForwardRank;
}

// Row numbers as int64; the first that no row of the factor has makes the message.
std::string read_numbers(const Tensor& t, int64_t rows, std::vector<int64_t>& numbers) {
    const bool wide = t.scalar_type() == ScalarType::Long;
    if (!t.is_contiguous() || (!wide && t.scalar_type() != ScalarType::Int))
        return "inputs: accepted: contiguous float32, bfloat16, float16, or row numbers of int64 or int32";
    const void* data = t.const_data_ptr();
    numbers.resize(size_t(t.numel()));
    for (size_t i = 0; i < numbers.size(); ++i) {
        numbers[i] = wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
        if (numbers[i] < 0 || numbers[i] >= rows)
            return "inputs: got row number " + std::to_string(numbers[i]) + "; accepted: 0 to " +
                   std::to_string(rows - 1);
    }
    return "";
}

bool overlap(const Tensor& y, const void* other, int64_t bytes) {
    const char *begin = (const char*)y.const_data_ptr(), *data = (const char*)other;
    return data < begin + y.numel() * itemsize(dtype_of(y)) && begin < data + bytes;
}

// What is wrong with the arguments, or "" and the pass. Nothing is written here.
std::string understand(const Tensor& outputs, const Tensor& inputs, const Tensor& left, const Tensor& right,
                       int64_t parts, bool transposed, Forward& f) {
    ForwardPass& pass = f.pass;
    const int64_t dim = outputs.dim();
    if (!outputs.is_cpu() || !dtype_if(outputs, pass.out_type) || dim < 2 || !outputs.is_contiguous())
        return "outputs: accepted: contiguous CPU rows of float32, bfloat16, float16";
    Factor a, b;
    if (!factor_if(left, pass.out_type, a) || !factor_if(right, pass.out_type, b) || a.rank != b.rank)
        return "left, right: accepted: contiguous CPU (rows, rank <= 512) of one rank, float32 or outputs' dtype";
    f.into = transposed ? a : b, f.out_of = transposed ? b : a, f.parts = parts;
    f.tokens = 1;
    for (int64_t i = 0; i < dim - 1; ++i) f.tokens *= outputs.size(i);
    if (outputs.size(dim - 1) != f.out_of.rows) return "outputs: accepted: a column per row of the factor";
    if (parts == 2 && outputs.size(0) % 2) return "cores: accepted: two for an even number of rows";
    const bool numbers = transposed && inputs.dim() == dim - 1;
    if (!inputs.is_cpu() || (!numbers && (inputs.dim() != dim || inputs.size(dim - 1) != f.into.rows)))
        return "inputs: accepted: a CPU tensor of outputs' rows, as wide as a factor has rows, or of row numbers";
    for (int64_t i = 0; i < dim - 1; ++i)
        if (inputs.size(i) != outputs.size(i)) return "inputs: accepted: as many rows as outputs";
    pass.into_type = f.into.dtype, pass.into = f.into.data, pass.inputs = f.into.rows;
    pass.outputs = f.out_of.rows, pass.rank = a.rank, pass.width = (a.rank + 7) / 8 * 8;
    const auto bytes = [](const Factor& x) { return x.rows * x.rank * itemsize(x.dtype); };
    if (overlap(outputs, a.data, bytes(a)) || overlap(outputs, b.data, bytes(b)))
        return "left, right: accepted: factors that share no memory with outputs";
    if (numbers) {
        const std::string problem = read_numbers(inputs, f.into.rows, f.numbers);
        pass.numbers = f.numbers.data();
        return problem;
    }
    const bool rows = dim == 2 && (f.into.rows < 2 || inputs.stride(1) == 1);
    if (!dtype_if(inputs, pass.in_type) || !(rows || inputs.is_contiguous()))
        return "inputs: accepted: contiguous rows of float32, bfloat16, float16";
    pass.in = inputs.const_data_ptr(), pass.ld_in = rows ? inputs.stride(0) : f.into.rows;
    const int64_t span = ((f.tokens - 1) * pass.ld_in + f.into.rows) * itemsize(pass.in_type);
    if (f.tokens > 0 && f.into.rows > 0 && overlap(outputs, pass.in, span))
        return "inputs: accepted: inputs that share no memory with outputs";
    return "";
}

// out[k][i] = in[i][k]
void transpose(const float* in, int64_t rows, int64_t columns, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; ++k) out[k * ld_out + i] = in[i * ld_in + k];
}

// Rows begin .. end of a factor as float32, `ld` floats apart.
void widen_rows(const Factor& f, int64_t begin, int64_t end, float* out, int64_t ld) {
    const char* in = (const char*)f.data;
    const int64_t size = f.rank * itemsize(f.dtype);
    if (ld == f.rank) return kernels().to_float(f.dtype, in + begin * size, out, (end - begin) * f.rank);
    for (int64_t row = begin; row < end; ++row, out += ld) kernels().to_float(f.dtype, in + row * size, out, f.rank);
}

// Uninitialised, on a cache line.
struct Floats {
    std::unique_ptr<float[]> memory;
    float* data;
    explicit Floats(int64_t count) : memory(new float[size_t(count) + 16]) {
        data = (float*)((uintptr_t(memory.get()) + 63) / 64 * 64);
    }
};

// cores: M of every part, rank x rank.
void run(Forward& f, const Tensor& outputs, const float* const* cores, bool transposed) {
    if (outputs.numel() == 0 || f.into.rows == 0) return;
    ForwardPass& pass = f.pass;
    pass.out = outputs.mutable_data_ptr();
    const Factor &into = f.into, &out_of = f.out_of;
    const int64_t rank = pass.rank, width = pass.width, parts = f.parts, panel = kernels().forward_panel;

    // F_in is read in place where its rows are whole vectors of float32; a gather widens what it reads.
    const bool in_place = pass.numbers || (into.dtype == DType::f32 && width == rank);
    const int64_t out_items = (out_of.rows + panel - 1) / panel;
    const int64_t in_items = in_place ? 0 : (into.rows + panel - 1) / panel;
    const Floats packed_out(out_items * panel * rank), packed_in(in_items * panel * width);
    const Floats packed_cores(parts * rank * width);
    const auto pack = [&](int64_t item) {
        if (item < out_items) {
            const int64_t begin = item * panel, rows = std::min(panel, out_of.rows - begin);
            float* to = packed_out.data + begin * rank;
            if (rows < panel) std::fill(to, to + panel * rank, 0.0f);
            if (out_of.dtype == DType::f32)
                return transpose((const float*)out_of.data + begin * rank, rows, rank, rank, to, panel);
            std::vector<float> wide(size_t(rows * rank));
            widen_rows(out_of, begin, begin + rows, wide.data(), rank);
            transpose(wide.data(), rows, rank, rank, to, panel);
        } else {
            const int64_t begin = (item - out_items) * panel, end = std::min(begin + panel, into.rows);
            float* to = packed_in.data + begin * width;
            if (width > rank) std::fill(to, to + (end - begin) * width, 0.0f);
            widen_rows(into, begin, end, to, width);
        }
    };
    for (int64_t i = 0; i < parts; ++i) {  // rank x width: row b is what t[b] is multiplied with
        const float* m = cores[i];
        float* to = packed_cores.data + i * rank * width;
        std::fill(to, to + rank * width, 0.0f);
        if (transposed)
            for (int64_t k = 0; k < rank; ++k) std::copy(m + k * rank, m + (k + 1) * rank, to + k * width);
        else transpose(m, rank, rank, rank, to, width);
    }
    constexpr int64_t kPackFloats = 1 << 16;  // a thread is worth its start
    const auto pack_all = [&](int64_t item, int64_t end) {
        for (; item < end; ++item) pack(item);
    };
    torch::stable::parallel_for(0, out_items + in_items, std::max<int64_t>(kPackFloats / (panel * rank), 1), pack_all);
    if (!in_place) pass.into = packed_in.data;
    pass.out_of = packed_out.data;

    // One region over fours of tokens, which no tile splits; a thread's run may reach into the other core's half.
    constexpr int64_t kFour = 4, kProducts = 1 << 18;
    const int64_t part = f.tokens / parts, fours = (part + kFour - 1) / kFour;
    const int64_t work = kFour * rank * (pass.outputs + (pass.numbers ? rank : pass.inputs));
    const auto apply = [&](int64_t begin, int64_t end) {
        const Floats scratch(kForwardScratch);
        for (int64_t i = begin / fours; begin < end; ++i) {
            const int64_t start = i * fours, stop = std::min(end, start + fours);
            kernels().forward(pass, packed_cores.data + i * rank * width, i * part + (begin - start) * kFour,
                              i * part + std::min((stop - start) * kFour, part), scratch.data);
            begin = stop;
        }
    };
    torch::stable::parallel_for(0, parts * fours, std::max<int64_t>(kProducts / work, 1), apply);
}

bool core_if(const Tensor& t, int64_t rank) {
    return t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == rank &&
           t.size(1) == rank && t.is_contiguous();
}

void low_rank_forward(Tensor outputs, Tensor inputs, Tensor left, Tensor right, std::vector<Tensor> cores,
                      bool transposed) {
    Forward f = {};
    STD_TORCH_CHECK(cores.size() == 1 || cores.size() == 2, "cores: accepted: one or two");
    const std::string problem = understand(outputs, inputs, left, right, int64_t(cores.size()), transposed, f);
    STD_TORCH_CHECK(problem.empty(), problem);
    const float* data[2] = {};
    for (size_t i = 0; i < cores.size(); ++i) {
        STD_TORCH_CHECK(core_if(cores[i], f.pass.rank), "cores: accepted: contiguous CPU (rank, rank) of float32");
        data[i] = (const float*)cores[i].const_data_ptr();
    }
    run(f, outputs, data, transposed);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pgap_kernels_cpu, m) {
    m.def("low_rank_forward(Tensor(a!) outputs, Tensor inputs, Tensor left, Tensor right, Tensor[] cores, "
          "bool transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgap_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("low_rank_forward", TORCH_BOX(&low_rank_forward));
}
