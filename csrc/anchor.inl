// W <- round(fma(c, X, W0)),  X = Delta where it is stored, else W - W0 in float32
//
// With a stored Delta, W is only written, so that any number of values of c can be tried without accumulating
// rounding.

// out = fma(c, x - origin, origin);  fma(c, x, origin) if x is the difference itself
template <class X, class T, class A, class B>
static int64_t anchor_lanes(T* out, const A* origin, const B* x, bool is_difference, float c, int64_t i, int64_t n) {
    const typename X::F factor = X::set(c);
    for (; i + X::N <= n; i += X::N) {
        const typename X::F o = X::load(origin + i), value = X::load(x + i);
        X::store(out + i, X::fma(factor, is_difference ? value : X::sub(value, o), o));
    }
    return i;
}
template <class T, class A, class B>
static void anchor_row(T* out, const A* origin, const B* x, bool is_difference, float c, int64_t n) {
    const int64_t done = anchor_lanes<V>(out, origin, x, is_difference, c, 0, n);
    anchor_lanes<Generic<1>>(out, origin, x, is_difference, c, done, n);
}

template <class T> static void anchor_groups(const AnchorPass& pass, const Piece& p, int64_t group_begin,
                                             int64_t group_end) {
    alignas(64) float acc[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2, is_difference = p.delta.data;
    const Companion from = is_difference ? p.delta : Companion{.data = const_cast<void*>(p.in), .ld = p.ld_in,
                                                               .dtype = pass.dtype};
    const float c = pass.coefficient[p.column];
    for (int64_t index = group_begin; index < group_end; ++index) {
        Group g;
        if (!enter_group<T>(p, index, g)) continue;
        if (stochastic) element_words(words, g, p.tensor_id, *pass.rounding_key);
        for_each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            T* const out = (T*)p.out + row * p.ld_out + column;
            with_companion<T>(p.anchor, row, column, [&](auto* origin) {
                with_companion<T>(from, row, column, [&](auto* x) {
                    if (!stochastic) return anchor_row(out, origin, x, is_difference, c, n);
                    anchor_row(acc, origin, x, is_difference, c, n);
                    apply_stochastic(out, (const T*)nullptr, acc, words + lo, n, 0.0f);
                });
            });
        });
    }
}

static void anchor(const AnchorPass& pass, const Piece& piece, int64_t group_begin, int64_t group_end) {
    dispatch_dtype(pass.dtype, [&](auto t) { anchor_groups<decltype(t)>(pass, piece, group_begin, group_end); });
}
