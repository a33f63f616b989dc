// Packs the right side of a product as the ops of lowrank and forward do.
#pragma once
#include "run.h"

namespace pgap {

// Columns begin .. end - 1 of a matrix with `depth` rows as panels of [depth][panel], zero-padded.
inline Matrix pack_panels(const Matrix& from, int64_t begin, int64_t end, int64_t panel) {
    const int64_t depth = from.rows, panels = (end - begin + panel - 1) / panel;
    Matrix to(DType::f32, 1, panels * panel * depth, 0, 0, 0);
    for (int64_t j = 0; j < panels * panel; ++j)
        for (int64_t k = 0; k < depth; ++k) {
            float& item = to.floats()[(j / panel * depth + k) * panel + j % panel];
            item = begin + j < end ? *(float*)from.at(k, begin + j) : 0;
        }
    return to;
}

}  // namespace pgap
