// Where pixels read a map that is upsampled bilinearly, in the numbers of ATen's
// upsample_bilinear2d (align_corners=False): along a row first, and then between two rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fastcil {

// A pixel lies between two positions of the map; the weight is that of the second.
template <typename working_t>
struct Tap {
  int64_t first, second;
  working_t weight;

  working_t blend(working_t a, working_t b) const {
    return std::fma(a, 1 - weight, b * weight);
  }
};

// One side of a map, stretched to one side of an image.
template <typename working_t>
struct Stretch {
  int64_t positions = 0, side = 0;
  working_t scale = 0;

  Stretch() = default;
  Stretch(int64_t positions, int64_t side)
      : positions(positions),
        side(side),
        scale(static_cast<working_t>(positions) / static_cast<working_t>(side)) {}

  Tap<working_t> tap(int64_t pixel) const {
    const working_t half = 0.5;
    const working_t source =
        std::max<working_t>(std::fma(scale, static_cast<working_t>(pixel) + half, -half), 0);
    const int64_t first = std::min(static_cast<int64_t>(source), positions - 1);
    const working_t weight = std::min<working_t>(source - static_cast<working_t>(first), 1);
    return {first, std::min(first + 1, positions - 1), weight};
  }
};

}  // namespace fastcil
