// fastcil::salient_masks on the CPU: one row of an image after the other, from the rows of its map.
//
// The enlarged map is bilinear between neighbouring positions of the map, so its least and its
// greatest value lie on the first or the last pixel of such a run, along both sides.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <vector>

#include "bilinear.h"
#include "lanes.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

constexpr int64_t kLongestSide = 32767;        // what int16 holds
constexpr float kRounding = 1.0f / (1 << 20);  // as in fastcil/ops/salient_masks.py
constexpr int64_t kGrain = 1 << 15;            // pixels that are worth a thread

// Marks one image after the other, keeping its buffers.
class Marker {
 public:
  Marker(int64_t map_height, int64_t map_width, float threshold)
      : map_height_(map_height), map_width_(map_width), threshold_(threshold) {}

  void mark(const float* map, int64_t height, int64_t width, bool* salient) {
    rows_.fit(map_height_, height);
    fit_columns(width);
    for (int64_t i = 0; i < map_height_; ++i) stretch(map + i * map_width_, line(i));
    find_bounds();
    const float span = high_ - low_;
    // NaN fails the comparisons, as does infinity: inf - inf is NaN.
    const bool speaks = span > kRounding * std::max(std::abs(low_), std::abs(high_)) &&
                        span < std::numeric_limits<float>::infinity();
    if (!speaks) {
      std::memset(salient, 1, height * width);
      return;
    }
    for (int64_t y = 0; y < height; ++y) mark_row(y, threshold_ * span, salient + y * width);
  }

 private:
  int64_t map_height_, map_width_;
  float threshold_, low_ = 0, high_ = 0;
  Runs<float> rows_, columns_;
  std::vector<Tap<float>> taps_;  // of the columns
  std::vector<float> lines_;      // the map's rows, stretched
  std::vector<float> row_;        // of the enlarged map, above its least value

  float* line(int64_t i) { return lines_.data() + i * taps_.size(); }

  void fit_columns(int64_t width) {
    if (width == static_cast<int64_t>(taps_.size())) return;
    columns_.fit(map_width_, width);
    taps_.resize(width);
    for (int64_t x = 0; x < width; ++x) taps_[x] = columns_.stretch.tap(x);
    lines_.resize(map_height_ * width);
    row_.resize(width);
  }

  void stretch(const float* positions, float* out) const {
    for (size_t x = 0; x < taps_.size(); ++x) {
      out[x] = taps_[x].blend(positions[taps_[x].first], positions[taps_[x].second]);
    }
  }

  // NaN if one of the values is.
  void find_bounds() {
    low_ = std::numeric_limits<float>::infinity();
    high_ = -low_;
    for (const auto& end : rows_.ends) {
      const float *upper = line(end.first), *lower = line(end.second);
      for (const Run& run : columns_.runs) {
        for (const int64_t x : {run.first, run.last}) {
          const float value = end.blend(upper[x], lower[x]);
          if (std::isnan(value)) {
            low_ = high_ = value;
            return;
          }
          low_ = std::min(low_, value);
          high_ = std::max(high_, value);
        }
      }
    }
  }

  void mark_row(int64_t y, float bound, bool* salient) {
    using Vector = at::vec::Vectorized<float>;
    const auto tap = rows_.stretch.tap(y);
    const float *upper = line(tap.first), *lower = line(tap.second);
    const Vector weight(tap.weight), rest(1 - tap.weight), low(low_);
    const int64_t width = row_.size();
    sweep<float>(width, [&](int64_t x, int64_t count) {
      const Vector below = get(lower + x, count) * weight;
      put(at::vec::fmadd(get(upper + x, count), rest, below) - low, row_.data() + x, count);
    });
    const float* above = row_.data();
    for (int64_t x = 0; x < width; ++x) salient[x] = above[x] > bound;
  }
};

at::Tensor salient_masks_cpu(const at::Tensor& maps, const at::Tensor& sizes, double threshold) {
  const auto given = maps.to(at::kFloat).contiguous();
  const auto sides = sizes.to(at::kCPU, at::kLong).contiguous();
  const int64_t* side = sides.const_data_ptr<int64_t>();
  const int64_t count = given.size(0), height = given.size(1), width = given.size(2);
  std::vector<int64_t> starts(count + 1, 0);
  if (count > 0) {
    const auto [least, most] = std::minmax_element(side, side + 2 * count);
    TORCH_CHECK_VALUE(*least >= 1 && *most <= kLongestSide, "sizes holds sides from ", *least,
                      " to ", *most, "; a side must be 1 to ", kLongestSide, " pixels long.");
  }
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + side[2 * i] * side[2 * i + 1];
  const at::Tensor masks = recycled_empty({starts[count]}, at::kBool);
  bool* salient = masks.mutable_data_ptr<bool>();
  if (threshold == 0) {
    std::memset(salient, 1, starts[count]);
    return masks;
  }
  const float* map = given.const_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kGrain * count / std::max<int64_t>(1, starts[count]));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Marker marker(height, width, static_cast<float>(threshold));
    for (int64_t i = begin; i < end; ++i) {
      marker.mark(map + i * height * width, side[2 * i], side[2 * i + 1], salient + starts[i]);
    }
  });
  return masks;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("salient_masks", &salient_masks_cpu); }

}  // namespace fastcil
