// Where pixels read a map that is upsampled bilinearly, in the numbers of ATen's
// upsample_bilinear2d (align_corners=False): along a row first, and then between two rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

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

// Pixels that lie between the same two positions of the map.
struct Run {
  int64_t first, last;
};

// All of them, and the ends of each as taps.
template <typename working_t>
struct Runs {
  Stretch<working_t> stretch;
  std::vector<Run> runs;
  std::vector<Tap<working_t>> ends;

  void fit(int64_t positions, int64_t side) {
    if (positions == stretch.positions && side == stretch.side) return;
    stretch = Stretch<working_t>(positions, side);
    runs.clear();
    ends.clear();
    int64_t first = 0;
    for (int64_t k = 1; k <= positions && first < side; ++k) {
      const int64_t next = k < positions ? start(k) : side;
      if (next == first) continue;
      runs.push_back({first, next - 1});
      ends.push_back(stretch.tap(first));
      if (next - 1 > first) ends.push_back(stretch.tap(next - 1));
      first = next;
    }
  }

 private:
  // The first pixel at or behind position k.
  int64_t start(int64_t k) const {
    const double guess = std::ceil((k + 0.5) / stretch.scale - 0.5);
    int64_t pixel = std::clamp<int64_t>(static_cast<int64_t>(guess), 0, stretch.side);
    while (pixel > 0 && stretch.tap(pixel - 1).first >= k) --pixel;
    while (pixel < stretch.side && stretch.tap(pixel).first < k) ++pixel;
    return pixel;
  }
};

}  // namespace fastcil
