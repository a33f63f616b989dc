// sum x z(key), or sum x x without a key;  x = W, or W - W0 in float32 with an anchor W0
//
// Products of two floats are exact in float64. They are summed in a fixed order, so that the result depends neither on
// threads nor on the instruction set. A group has 16 sums: in the part of each row that lies in the group, counted from
// its start, elements i, i + 16, i + 32 .. go into sum i. The 16 are then added in order, and so are the totals of the
// groups (ops_reduction.cpp).
constexpr int kReductionSums = 16;

// Adds n consecutive elements of one row. `origin` is null without an anchor, and z without a key.
template <class T, class A>
static void add_products(double (&sums)[kReductionSums], const T* in, const A* origin, const float* z, int64_t n) {
    constexpr int kVectors = kReductionSums / V::N;
    V::D acc[kVectors];
    for (int v = 0; v < kVectors; ++v) acc[v] = V::load(sums + v * V::N);
    int64_t i = 0;
    for (; i + kReductionSums <= n; i += kReductionSums)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = i + v * V::N;
            V::F x = V::load(in + at);
            if (origin) x = V::sub(x, V::load(origin + at));
            acc[v] = V::add_product(x, z ? V::load(z + at) : x, acc[v]);
        }
    for (int v = 0; v < kVectors; ++v) V::store(sums + v * V::N, acc[v]);
    for (int k = 0; i < n; ++i, ++k) {  // the tail: i is a multiple of 16 here, so it belongs to sum 0
        const float x = origin ? to_float(in[i]) - to_float(origin[i]) : to_float(in[i]);
        sums[k] += double(x) * double(z ? z[i] : x);
    }
}

// Writes the total of each group, 0 where the piece has no element in it.
template <class T> static void reduction_groups(const ReductionPass& pass, const Piece& p, int64_t group_begin,
                                                int64_t group_end, double* partials) {
    alignas(64) float z[kGroup];
    for (int64_t index = group_begin; index < group_end; ++index) {
        double sums[kReductionSums] = {}, total = 0;
        Group g;
        if (enter_group<T>(p, index, g)) {
            if (pass.key) add_draw<true>(z, g, pass.distribution, p.tensor_id, *pass.key, 1.0f);
            for_each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
                const T* in = (const T*)p.in + row * p.ld_in + column;
                with_companion<T>(p.anchor, row, column, [&](auto* origin) {
                    add_products(sums, in, origin, pass.key ? z + lo : nullptr, n);
                });
            });
        }
        for (const double sum : sums) total += sum;
        *partials++ = total;
    }
}

static void reduction(const ReductionPass& pass, const Piece& piece, int64_t group_begin, int64_t group_end,
                      double* partials) {
    dispatch_dtype(pass.dtype,
                   [&](auto t) { reduction_groups<decltype(t)>(pass, piece, group_begin, group_end, partials); });
}
