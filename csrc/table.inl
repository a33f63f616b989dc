// The table of one build; included last in its namespace.
static constexpr Kernels table(const char* name) {
    return {name, kPanel, kForwardPanel, kPairs, dense, masked, preconditioned, affine, reduce, low_rank, forward,
            to_float, round_to, transform};
}
