// fastcil::cam_boxes on the CPU: one image after the other, from its map at the map's resolution.
//
// Between two neighbouring positions of the map the upsampled surface is monotone along a line. So
// a line's maximum lies on the first or the last pixel of some run of pixels between the same two
// positions, and where one end of a run is marked and the other is not, bisection finds the border.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "bilinear.h"
#include "lanes.h"

namespace fastcil {
namespace {

constexpr int64_t kLongestSide = 32767;  // what int16 holds
constexpr int kTogether = 8;             // channels summed before they join the total
constexpr int64_t kGrain = 1 << 15;      // features that are worth a thread

// Adds N channels to the totals, one vector of positions after the other: the last one starts where
// it ends with the plane, and so overlaps the one before.
template <int N, typename scalar_t>
void add_planes(const scalar_t* planes, const Working<scalar_t>* weights, int64_t positions,
                Working<scalar_t>* totals) {
  constexpr int64_t size = Lanes<scalar_t>::size();
  Lanes<scalar_t> weight[N];
  for (int n = 0; n < N; ++n) weight[n] = Lanes<scalar_t>(weights[n]);
  const int64_t count = std::min(size, positions);
  for (int64_t i = 0; i < positions; i += size, totals += size) {
    const scalar_t* place = planes + std::min(i, positions - count);
    Lanes<scalar_t> sum = get(place, count) * weight[0];
    for (int n = 1; n < N; ++n) {
      sum = at::vec::fmadd(get(place + n * positions, count), weight[n], sum);
    }
    (Lanes<scalar_t>::loadu(totals) + sum).store(totals);
  }
}

// The weighted sum over channels of [channels, positions].
template <typename scalar_t>
void sum_planes(const scalar_t* features, const Working<scalar_t>* weights, int64_t channels,
                int64_t positions, std::vector<Working<scalar_t>>& totals,
                Working<scalar_t>* activation) {
  constexpr int64_t size = Lanes<scalar_t>::size();
  totals.assign((positions + size - 1) / size * size, 0);
  int64_t c = 0;
  for (; c + kTogether <= channels; c += kTogether) {
    add_planes<kTogether>(features + c * positions, weights + c, positions, totals.data());
  }
  for (; c < channels; ++c) {
    add_planes<1>(features + c * positions, weights + c, positions, totals.data());
  }
  const int64_t count = std::min(size, positions);
  for (int64_t i = 0; i < positions; i += size) {
    std::copy_n(totals.data() + i, count, activation + std::min(i, positions - count));
  }
}

// The same of [positions, channels].
template <typename scalar_t>
void sum_pixels(const scalar_t* features, const Working<scalar_t>* weights, int64_t channels,
                int64_t positions, Working<scalar_t>* activation) {
  constexpr int64_t size = Lanes<scalar_t>::size();
  constexpr int kSums = 4;
  for (int64_t i = 0; i < positions; ++i, features += channels) {
    Lanes<scalar_t> sums[kSums];
    for (auto& sum : sums) sum = Lanes<scalar_t>(0);
    int64_t c = 0;
    for (; c + kSums * size <= channels; c += kSums * size) {
      for (int n = 0; n < kSums; ++n) {
        const int64_t at = c + n * size;
        sums[n] = at::vec::fmadd(get(features + at), get(weights + at), sums[n]);
      }
    }
    for (; c < channels; c += size) {
      const int64_t count = std::min(size, channels - c);
      sums[0] = at::vec::fmadd(get(features + c, count), get(weights + c, count), sums[0]);
    }
    Working<scalar_t> lanes[size], total = 0;
    ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes);
    for (const auto lane : lanes) total += lane;
    activation[i] = total;
  }
}

// Scales a map to [0, 1] as fastcil/ops/cam.py does: zeros if it is constant, NaN if any of it is.
template <typename working_t>
void normalise(std::vector<working_t>& map) {
  working_t low = map[0], high = map[0];
  bool spoilt = false;
  for (const working_t value : map) {
    low = std::min(low, value);
    high = std::max(high, value);
    spoilt |= std::isnan(value);
  }
  if (spoilt) low = std::numeric_limits<working_t>::quiet_NaN();
  const working_t span = high - low;
  const working_t rounding = 16 * std::numeric_limits<working_t>::epsilon();
  const bool constant = span <= rounding * std::max(std::abs(high), std::abs(low));
  for (working_t& value : map) value = constant ? 0 : (value - low) / span;
}

// The first marked pixel, -1 without any.
template <typename Marked>
int64_t first_marked(const std::vector<Run>& runs, const Marked& marked) {
  for (const Run& run : runs) {
    if (marked(run.first)) return run.first;
    if (!marked(run.last)) continue;
    int64_t no = run.first, yes = run.last;
    while (yes - no > 1) {
      const int64_t middle = (no + yes) / 2;
      (marked(middle) ? yes : no) = middle;
    }
    return yes;
  }
  return -1;
}

// The last marked pixel, of which there is one.
template <typename Marked>
int64_t last_marked(const std::vector<Run>& runs, const Marked& marked) {
  for (size_t n = runs.size(); n-- > 0;) {
    const Run& run = runs[n];
    if (marked(run.last)) return run.last;
    if (!marked(run.first)) continue;
    int64_t yes = run.first, no = run.last;
    while (no - yes > 1) {
      const int64_t middle = (yes + no) / 2;
      (marked(middle) ? yes : no) = middle;
    }
    return yes;
  }
  return -1;
}

struct Features {
  int64_t channels, height, width;
  bool channels_last;

  int64_t positions() const { return height * width; }
};

// Finds one box after the other, keeping its buffers.
template <typename scalar_t>
class Finder {
 public:
  using working_t = Working<scalar_t>;

  Finder(const Features& shape, double threshold)
      : shape_(shape), threshold_(static_cast<working_t>(threshold)), map_(shape.positions()) {}

  bool find(const scalar_t* features, const working_t* weights, int64_t height, int64_t width,
            int16_t* box) {
    if (shape_.channels_last) {
      sum_pixels(features, weights, shape_.channels, shape_.positions(), map_.data());
    } else {
      sum_planes(features, weights, shape_.channels, shape_.positions(), totals_, map_.data());
    }
    normalise(map_);
    rows_.fit(shape_.height, height);
    columns_.fit(shape_.width, width);
    resample_rows();
    const auto row = [this](int64_t y) { return row_marked(y); };
    const auto column = [this](int64_t x) { return column_marked(x); };
    const int64_t y0 = first_marked(rows_.runs, row);
    const int64_t x0 = y0 < 0 ? -1 : first_marked(columns_.runs, column);
    const bool some = x0 >= 0;
    box[0] = some ? y0 : 0;
    box[1] = some ? x0 : 0;
    box[2] = some ? last_marked(rows_.runs, row) + 1 : 0;
    box[3] = some ? last_marked(columns_.runs, column) + 1 : 0;
    return some;
  }

 private:
  Features shape_;
  working_t threshold_;
  Runs<working_t> rows_, columns_;
  std::vector<working_t> map_, totals_;
  std::vector<working_t> few_;   // the map's rows at the ends of runs of columns
  std::vector<working_t> line_;  // one pixel of each of the map's rows

  void resample_rows() {
    const size_t pixels = columns_.ends.size();
    few_.resize(shape_.height * pixels);
    line_.resize(shape_.height);
    for (int64_t i = 0; i < shape_.height; ++i) {
      const working_t* positions = map_.data() + i * shape_.width;
      working_t* out = few_.data() + i * pixels;
      for (size_t n = 0; n < pixels; ++n) {
        const auto& tap = columns_.ends[n];
        out[n] = tap.blend(positions[tap.first], positions[tap.second]);
      }
    }
  }

  bool row_marked(int64_t y) const {
    const auto tap = rows_.stretch.tap(y);
    const size_t pixels = columns_.ends.size();
    const working_t* upper = few_.data() + tap.first * pixels;
    const working_t* lower = few_.data() + tap.second * pixels;
    bool marked = false;
    for (size_t n = 0; n < pixels; ++n) marked |= tap.blend(upper[n], lower[n]) > threshold_;
    return marked;
  }

  bool column_marked(int64_t x) {
    const auto tap = columns_.stretch.tap(x);
    for (int64_t i = 0; i < shape_.height; ++i) {
      const working_t* positions = map_.data() + i * shape_.width;
      line_[i] = tap.blend(positions[tap.first], positions[tap.second]);
    }
    bool marked = false;
    for (const auto& end : rows_.ends) {
      marked |= end.blend(line_[end.first], line_[end.second]) > threshold_;
    }
    return marked;
  }
};

void check_sizes(const int64_t* sizes, int64_t count) {
  if (count == 0) return;
  const auto [least, most] = std::minmax_element(sizes, sizes + count);
  TORCH_CHECK_VALUE(*least >= 1 && *most <= kLongestSide, "sizes holds sides from ", *least,
                    " to ", *most, "; a side must be 1 to ", kLongestSide, " pixels long.");
}

std::tuple<at::Tensor, at::Tensor> cam_boxes_cpu(const at::Tensor& features,
                                                 const at::Tensor& class_weights,
                                                 const at::Tensor& sizes, double threshold) {
  const bool last =
      !features.is_contiguous() && features.is_contiguous(at::MemoryFormat::ChannelsLast);
  const auto maps = last ? features : features.contiguous();
  const Features shape{maps.size(1), maps.size(2), maps.size(3), last};
  const int64_t count = maps.size(0), stride = shape.channels * shape.positions();
  const auto sides = sizes.to(at::kLong).contiguous();
  const int64_t* side = sides.const_data_ptr<int64_t>();
  check_sizes(side, 2 * count);
  at::Tensor boxes = at::empty({count, 4}, maps.options().dtype(at::kShort));
  at::Tensor valid = at::empty({count}, maps.options().dtype(at::kBool));
  int16_t* box = boxes.mutable_data_ptr<int16_t>();
  bool* ok = valid.mutable_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), "cam_boxes", [&] {
    using working_t = Working<scalar_t>;
    const auto rows = class_weights.to(c10::CppTypeToScalarType<working_t>::value).contiguous();
    const working_t* row = rows.template const_data_ptr<working_t>();
    const scalar_t* map = maps.const_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / stride);
    at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) {
      Finder<scalar_t> finder(shape, threshold);
      for (int64_t i = begin; i < end; ++i) {
        ok[i] = finder.find(map + i * stride, row + i * shape.channels, side[2 * i],
                            side[2 * i + 1], box + 4 * i);
      }
    });
  });
  return {boxes, valid};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("cam_boxes", &cam_boxes_cpu); }

}  // namespace fastcil
