// Walks over the groups of 4096 consecutive logical elements that a piece reaches into.
//
//   element (row, col)  ->  e = base + row * row_stride + col,  group e >> 12,  index within the group e & 4095
//
// Groups are those of the unsharded tensor, so an element's noise depends neither on shards nor on the split over
// threads. 4096 floats of delta are 16 KB, which stay in L1 while W passes by.

// The part of a piece within one group. Indices of elements are relative to the group.
struct Group {
    int64_t index;
    int64_t row, row_end;            // rows of the piece that reach into the group
    int64_t start;                   // index of the first of these rows' first element; negative if it lies before
    int64_t first, last;             // all elements of the piece in the group lie in [first, last)
    int64_t block_begin, block_end;  // counters that these need, multiples of V2::N
    const char* whole;               // if one row covers the group: its weights, to be prefetched while noise is drawn
    int64_t whole_bytes;
};

// False if no row of the piece reaches into the group, which happens if rows are far apart.
template <class T> static bool enter_group(const Piece& p, int64_t index, Group& g) {
    const int64_t group_start = index * kGroup;
    const int64_t after_row0 = group_start - p.base - p.cols;  // elements between row 0 and the group
    const int64_t row = after_row0 < 0 ? 0 : after_row0 / p.row_stride + 1;
    const int64_t start = p.base + row * p.row_stride - group_start;
    int64_t row_end = row;
    for (int64_t s = start; row_end < p.rows && s < kGroup; s += p.row_stride) ++row_end;
    if (row_end == row) return false;
    const int64_t end = start + (row_end - 1 - row) * p.row_stride + p.cols;
    const int64_t first = start > 0 ? start : 0, last = end < kGroup ? end : kGroup;
    g = {.index = index, .row = row, .row_end = row_end, .start = start, .first = first, .last = last,
         .block_begin = 0, .block_end = kBlocks, .whole = nullptr, .whole_bytes = 0};
    if (first / kBlocks == (last - 1) / kBlocks) {  // within one output lane, which may not need all counters
        g.block_begin = first % kBlocks / V2::N * V2::N;
        g.block_end = ((last - 1) % kBlocks / V2::N + 1) * V2::N;
    } else if (row_end - row == 1 && last - first == kGroup && p.in) {
        g.whole = (const char*)((const T*)p.in + row * p.ld_in - start);
        g.whole_bytes = kGroup * int64_t(sizeof(T));
    }
    return true;
}

// f(row, column, lo, n): elements [lo, lo + n) of the group are those of a row from that column on.
template <class F> static void for_each_row(const Piece& p, const Group& g, F f) {
    int64_t start = g.start;
    for (int64_t row = g.row; row < g.row_end; ++row, start += p.row_stride) {
        const int64_t lo = start > 0 ? start : 0, hi = start + p.cols < kGroup ? start + p.cols : kGroup;
        f(row, lo - start, lo, hi - lo);
    }
}

// Calls f with a pointer to (row, column) of the companion, typed float or T: attach_companions() admits only these.
// If the companion is absent, the pointer is null.
template <class T, class F> static void with_companion(const Companion& c, int64_t row, int64_t column, F f) {
    const int64_t at = row * c.ld + column;
    if (!c.data) f((const T*)nullptr);
    else if (c.dtype == DType::f32) f((const float*)c.data + at);
    else f((const T*)c.data + at);
}
