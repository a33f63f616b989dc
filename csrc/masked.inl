// W <- round(W - decay W + delta)
//
//   delta = sum_j a_j z(key_j)  where the mask keeps an element,  -0 elsewhere
//
//   threshold  keep if |W| <= threshold, of the W that is read
//   share      keep if the element's random word < word_limit; 2^32 keeps all
//   bits       keep if the element's stored bit is 1
//
// -0 and not 0, because adding it leaves every W as it is, W = -0 included. Decay applies to all elements.

// d[i] = -0 where bit number bit_index + i is 0.
static void mask_by_bits(float* d, const uint32_t* bits, int64_t bit_index, int64_t n) {
    const V::U minus_zero = V::setu(0x80000000u), ones = V::setu(~0u);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32, bit_index += 32) {
        const int shift = int(bit_index & 31);
        const uint32_t* from = bits + (bit_index >> 5);
        const uint32_t word = shift ? from[0] >> shift | from[1] << (32 - shift) : from[0];
        for (int bit = 0; bit < 32; bit += V::N) {
            const V::U drop = V::addu(V::shr<31>(V::lane_bits(word, bit)), ones), keep = V::xoru(drop, ones);
            const V::U kept = V::andu(V::as_u(V::load(d + i + bit)), keep);
            V::store(d + i + bit, V::as_f(V::oru(kept, V::andu(drop, minus_zero))));
        }
    }
    for (; i < n; ++i, ++bit_index)
        if (!(bits[bit_index >> 5] >> (bit_index & 31) & 1u)) d[i] = -0.0f;
}

template <class T> static void masked_groups(const MaskedPass& pass, const Piece& p, int64_t group_begin,
                                             int64_t group_end) {
    alignas(64) float delta[kGroup];
    alignas(64) uint32_t words[kGroup], mask_words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2;
    const float threshold = pass.threshold[p.column], decay = pass.decay[p.column];
    for (int64_t index = group_begin; index < group_end; ++index) {
        Group g;
        if (!enter_group<T>(p, index, g)) continue;
        sum_draws(delta, g, pass.draws, 0, pass.draws.count, p);
        if (pass.mask == Mask::share) element_words(mask_words, g, p.tensor_id, pass.mask_key);
        if (stochastic) element_words(words, g, p.tensor_id, *pass.rounding_key);
        for_each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            const T* in = (const T*)p.in + row * p.ld_in + column;
            float* d = delta + lo;
            switch (pass.mask) {
                case Mask::threshold:
                    for (int64_t i = 0; i < n; ++i) d[i] = __builtin_fabsf(to_float(in[i])) <= threshold ? d[i] : -0.0f;
                    break;
                case Mask::share:
                    for (int64_t i = 0; i < n; ++i) d[i] = mask_words[lo + i] < pass.word_limit ? d[i] : -0.0f;
                    break;
                case Mask::bits:
                    mask_by_bits(d, p.mask_bits, p.mask_offset + row * p.cols + column, n);
                    break;
            }
            apply_delta((T*)p.out + row * p.ld_out + column, in, d, stochastic ? words + lo : nullptr, n, decay);
        });
    }
}

static void masked(const MaskedPass& pass, const Piece& piece, int64_t group_begin, int64_t group_end) {
    dispatch_dtype(pass.dtype, [&](auto t) { masked_groups<decltype(t)>(pass, piece, group_begin, group_end); });
}
