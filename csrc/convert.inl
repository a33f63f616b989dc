// Conversions of whole arrays, and Box-Muller on arrays of words, for tests of the transform alone.

// Calls f with a zero of the C++ type in which a dtype is stored.
template <class F> static void dispatch_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f32: return f(float());
        case DType::bf16: return f(BF16());
        case DType::f16: return f(FP16());
    }
}

template <class T> static void convert_to_float(const T* in, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + V::N <= count; i += V::N) V::store(out + i, V::load(in + i));
    for (; i < count; ++i) out[i] = to_float(in[i]);
}
static void convert_to_float(DType from, const void* in, float* out, int64_t count) {
    dispatch_dtype(from, [&](auto t) { convert_to_float((const decltype(t)*)in, out, count); });
}

static void round_array(DType to, float* values, int64_t count) {
    dispatch_dtype(to, [&](auto t) {
        for (int64_t i = 0; i < count; ++i) {
            round_nearest(t, values[i]);
            values[i] = to_float(t);
        }
    });
}

static void box_muller_array(const uint32_t* a, const uint32_t* b, float* even, float* odd, int64_t count) {
    for (int64_t i = 0; i < count; i += V::N) {
        uint32_t words_a[V::N] = {}, words_b[V::N] = {};
        float z_even[V::N], z_odd[V::N];
        const int64_t n = count - i < V::N ? count - i : V::N;
        for (int64_t k = 0; k < n; ++k) {
            words_a[k] = a[i + k];
            words_b[k] = b[i + k];
        }
        V::F vector_even, vector_odd;
        box_muller<V>(V::loadu(words_a), V::loadu(words_b), vector_even, vector_odd);
        V::store(z_even, vector_even);
        V::store(z_odd, vector_odd);
        for (int64_t k = 0; k < n; ++k) {
            even[i + k] = z_even[k];
            odd[i + k] = z_odd[k];
        }
    }
}
