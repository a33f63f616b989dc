// W <- round(W - decay W + delta), with a rule that makes delta of two sums of the same draws and updates its state
//
//   g = sum_j c_j z(key_j)  the gradient estimate,  b = sum_j r_j z(key_j)  what restores W after a perturbation
//
//   perturb   delta = b / sqrt(H)
//   around    delta = fma(c, T, b)
//   momentum  m <- fma(beta, m, g)
//             delta = fma(-lr, m, b)
//   adam      m <- fma(beta1, m, rest1 g),  v <- fma(beta2, v, rest2 (g g))
//             delta = fma(-lr, m / (sqrt(v correction) + eps), b)
//   hizoo     H' <- fma(growth H, z z, rest H), z of the last draw
//             delta = fma(-lr, g / sqrt(H'), b / sqrt(H))
//   helene    m <- fma(beta1, m, anneal g);  in helene_refresh also  h <- fma(beta2, h, rest2 (g g))
//             delta = fma(-lr, m / fma(gamma, max(h, floor), eps), b)
//   adamu     y = h + b,  m = fma(beta1, g, rest1 y),  v = fma(beta2, g g, rest2 (y y)),  h <- sign m
//             delta = fma(-step, m / sqrt(v + eps), back m)
//
// The rules are plain loops, which the compiler vectorises. fma, / and sqrt are correctly rounded, so every
// instruction set gives the same bits.

// n consecutive elements. delta holds b at first.
struct RuleArguments {
    int64_t n;
    float* __restrict delta;
    const float *g, *z;
    float *__restrict state0, *__restrict state1;
    const float* scalars;
};

static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float square_root(float a) { return __builtin_sqrtf(a); }

// state0: H
static void rule_perturb(const RuleArguments& r) {
    for (int64_t i = 0; i < r.n; ++i) r.delta[i] = r.delta[i] / square_root(r.state0[i]);
}

// state0: T
static void rule_around(const RuleArguments& r) {
    const float c = r.scalars[0];
    for (int64_t i = 0; i < r.n; ++i) r.delta[i] = fused(c, r.state0[i], r.delta[i]);
}

// state0: m
static void rule_momentum(const RuleArguments& r) {
    const float lr = r.scalars[0], beta = r.scalars[1];
    for (int64_t i = 0; i < r.n; ++i) {
        const float m = r.state0[i] = fused(beta, r.state0[i], r.g[i]);
        r.delta[i] = fused(-lr, m, r.delta[i]);
    }
}

// state0: m, state1: v
static void rule_adam(const RuleArguments& r) {
    const float lr = r.scalars[0], beta1 = r.scalars[1], rest1 = r.scalars[2], beta2 = r.scalars[3],
                rest2 = r.scalars[4], correction = r.scalars[5], eps = r.scalars[6];
    for (int64_t i = 0; i < r.n; ++i) {
        const float g = r.g[i];
        const float m = r.state0[i] = fused(beta1, r.state0[i], rest1 * g);
        const float v = r.state1[i] = fused(beta2, r.state1[i], rest2 * (g * g));
        r.delta[i] = fused(-lr, m / (square_root(v * correction) + eps), r.delta[i]);
    }
}

// state0: H
static void rule_hizoo(const RuleArguments& r) {
    const float lr = r.scalars[0], rest = r.scalars[1], growth = r.scalars[2];
    for (int64_t i = 0; i < r.n; ++i) {
        const float h = r.state0[i], z = r.z[i];
        const float updated = r.state0[i] = fused(growth * h, z * z, rest * h);
        r.delta[i] = fused(-lr, r.g[i] / square_root(updated), r.delta[i] / square_root(h));
    }
}

// state0: m, state1: h
template <bool REFRESH> static void rule_helene(const RuleArguments& r) {
    const float lr = r.scalars[0], beta1 = r.scalars[1], anneal = r.scalars[2], gamma = r.scalars[3],
                floor = r.scalars[4], eps = r.scalars[5], beta2 = r.scalars[6], rest2 = r.scalars[7];
    for (int64_t i = 0; i < r.n; ++i) {
        const float g = r.g[i];
        const float m = r.state0[i] = fused(beta1, r.state0[i], anneal * g);
        if (REFRESH) r.state1[i] = fused(beta2, r.state1[i], rest2 * (g * g));
        const float h = r.state1[i];
        r.delta[i] = fused(-lr, m / fused(gamma, h > floor ? h : floor, eps), r.delta[i]);
    }
}

// state0: h
static void rule_adamu(const RuleArguments& r) {
    const float step = r.scalars[0], back = r.scalars[1], sign = r.scalars[2], beta1 = r.scalars[3],
                rest1 = r.scalars[4], beta2 = r.scalars[5], rest2 = r.scalars[6], eps = r.scalars[7];
    for (int64_t i = 0; i < r.n; ++i) {
        const float g = r.g[i], y = r.state0[i] + r.delta[i];
        const float m = fused(beta1, g, rest1 * y), v = fused(beta2, g * g, rest2 * (y * y));
        r.state0[i] = sign * m;
        r.delta[i] = fused(-step, m / square_root(v + eps), back * m);
    }
}

static void apply_rule(Rule rule, const RuleArguments& arguments) {
    switch (rule) {
        case Rule::perturb: return rule_perturb(arguments);
        case Rule::around: return rule_around(arguments);
        case Rule::momentum: return rule_momentum(arguments);
        case Rule::adam: return rule_adam(arguments);
        case Rule::hizoo: return rule_hizoo(arguments);
        case Rule::helene: return rule_helene<false>(arguments);
        case Rule::helene_refresh: return rule_helene<true>(arguments);
        case Rule::adamu: return rule_adamu(arguments);
    }
}

// Draws each z once for both sums. z keeps the last draw.
static void sum_draws_twice(float* g, float* b, float* z, const Group& group, const PreconditionedPass& pass,
                            const Piece& p) {
    for (int64_t j = 0; j < pass.draws.count; ++j) {
        add_draw<true>(z, group, pass.draws.distribution, p.tensor_id, pass.draws.keys[j], 1.0f);
        const int64_t at = j * pass.draws.columns + p.column;
        const float c = pass.draws.coefficients[at], r = pass.restore[at];
        for (int64_t i = group.first; i < group.last; ++i) {
            g[i] = j ? fused(c, z[i], g[i]) : c * z[i];
            b[i] = j ? fused(r, z[i], b[i]) : r * z[i];
        }
    }
}

static float* state_at(const Companion& c, int64_t row, int64_t column) {
    return c.data ? (float*)c.data + row * c.ld + column : nullptr;
}

template <class T> static void preconditioned_groups(const PreconditionedPass& pass, const Piece& p,
                                                     int64_t group_begin, int64_t group_end) {
    alignas(64) float delta[kGroup], g[kGroup], z[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2;
    const float decay = pass.decay[p.column];
    float scalars[kMaxRuleScalars] = {};
    for (int64_t k = 0; k < pass.scalar_count; ++k) scalars[k] = pass.scalars[k * pass.draws.columns + p.column];
    for (int64_t index = group_begin; index < group_end; ++index) {
        Group group;
        if (!enter_group<T>(p, index, group)) continue;
        sum_draws_twice(g, delta, z, group, pass, p);
        if (stochastic) element_words(words, group, p.tensor_id, *pass.rounding_key);
        for_each_row(p, group, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            apply_rule(pass.rule, {.n = n, .delta = delta + lo, .g = g + lo, .z = z + lo,
                                   .state0 = state_at(p.state0, row, column),
                                   .state1 = state_at(p.state1, row, column), .scalars = scalars});
            apply_delta((T*)p.out + row * p.ld_out + column, (const T*)p.in + row * p.ld_in + column, delta + lo,
                        stochastic ? words + lo : nullptr, n, decay);
        });
    }
}

static void preconditioned(const PreconditionedPass& pass, const Piece& piece, int64_t group_begin,
                           int64_t group_end) {
    dispatch_dtype(pass.dtype,
                   [&](auto t) { preconditioned_groups<decltype(t)>(pass, piece, group_begin, group_end); });
}
