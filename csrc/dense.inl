// W <- round(W - decay W + sum_j a_j z(key_j)), once per stage
//
//   delta = a_1 z_1,  then  delta = fma(a_j, z_j, delta)  for the other draws of the stage
//   delta = fma(-decay, W, delta)  if decay != 0
//   W     = round(W + delta), from which the next stage starts
//
// Without `in` the first stage writes delta itself. delta of a whole group is completed before W is touched, so that
// one body serves any number of draws, decay, stages, shards and both kinds of rounding.

// Fast path: a single Rademacher draw over a whole group, rounded to nearest, needs no buffer for delta.
template <class T> static void dense_one_sign_draw(const DensePass& pass, const Piece& p, const Group& g) {
    const SignWords signs(g, p.tensor_id, pass.draws.keys[0]);
    const V::U minus_a = V::as_u(V::set(-pass.draws.coefficients[p.column]));
    const float decay = pass.decay[p.column];
    const V::F d = V::set(decay);
    const T* in = (const T*)g.whole;
    T* out = (T*)p.out + g.row * p.ld_out - g.start;
    for (int i = 0; i < 128; i += V::N) {
        uint32_t words[V::N];
        signs.get(i, words);
        for (int k = 0; k < V::N; ++k)
            for (int bit = 0; bit < 32; bit += V::N, in += V::N, out += V::N) {
                const V::F delta = V::as_f(V::xoru(V::lane_bits(words[k], bit), minus_a)), w = V::load(in);
                V::store(out, V::add(w, decay != 0.0f ? V::fnma(d, w, delta) : delta));
            }
    }
}

template <class T> static void dense_groups(const DensePass& pass, const Piece& p, int64_t group_begin,
                                            int64_t group_end) {
    alignas(64) float delta[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_keys && sizeof(T) == 2;
    const bool one_sign_draw = pass.draws.distribution == Distribution::rademacher && pass.draws.count == 1 &&
                               pass.stages == 1 && pass.draws_per_stage[0] == 1 && !stochastic;
    for (int64_t index = group_begin; index < group_end; ++index) {
        Group g;
        if (!enter_group<T>(p, index, g)) continue;
        if (one_sign_draw && g.whole) {
            dense_one_sign_draw<T>(pass, p, g);
            continue;
        }
        int64_t draw = 0;
        for (int64_t stage = 0; stage < pass.stages; ++stage) {
            sum_draws(delta, g, pass.draws, draw, draw + pass.draws_per_stage[stage], p);
            draw += pass.draws_per_stage[stage];
            if (stochastic) element_words(words, g, p.tensor_id, pass.rounding_keys[stage]);
            const float decay = pass.decay[stage * pass.draws.columns + p.column];
            const T* source = (const T*)(stage == 0 ? p.in : p.out);
            const int64_t ld_source = stage == 0 ? p.ld_in : p.ld_out;
            for_each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
                T* out = (T*)p.out + row * p.ld_out + column;
                const T* in = source ? source + row * ld_source + column : nullptr;
                // Every stage but the last writes what the next one reads.
                apply_delta(out, in, delta + lo, stochastic ? words + lo : nullptr, n, decay,
                            p.stream && pass.stages == 1);
            });
        }
    }
    if (p.stream) V::fence();
}

static void dense(const DensePass& pass, const Piece& piece, int64_t group_begin, int64_t group_end) {
    dispatch_dtype(pass.dtype, [&](auto t) { dense_groups<decltype(t)>(pass, piece, group_begin, group_end); });
}
