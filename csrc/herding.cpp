// fastcil::herding on the CPU: one class after the other, in float64.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vec.h"

namespace fastcil {
namespace {

using Lanes = at::vec::Vectorized<double>;

constexpr double kTie = 1e-10;     // as in fastcil/ops/herding.py
constexpr double kSmallest = 1e-12;  // the norm below which torch's normalize does not divide
constexpr double kNever = std::numeric_limits<double>::infinity();

// Always in the same order, so that equal rows have equal products.
double dot(const double* a, const double* b, int64_t width) {
  Lanes sums[2] = {Lanes(0.0), Lanes(0.0)};
  int64_t d = 0;
  for (; d + 2 * Lanes::size() <= width; d += 2 * Lanes::size()) {
    for (int n = 0; n < 2; ++n) {
      const int64_t at = d + n * Lanes::size();
      sums[n] = at::vec::fmadd(Lanes::loadu(a + at), Lanes::loadu(b + at), sums[n]);
    }
  }
  double lanes[Lanes::size()];
  (sums[0] + sums[1]).store(lanes);
  double total = 0;
  for (const double lane : lanes) total += lane;
  for (; d < width; ++d) total += a[d] * b[d];
  return total;
}

// Herds one class after the other, keeping its buffers.
class Herder {
 public:
  explicit Herder(int64_t width) : width_(width), mean_(width), residual_(width) {}

  template <typename scalar_t>
  void herd(const scalar_t* features, int64_t count, int64_t limit, int64_t* order) {
    normalise(features, count);
    for (int64_t k = 0; k < std::min(limit, count); ++k) {
      order[k] = nearest(count);
      own_[order[k]] = kNever;
      const double* picked = unit_.data() + order[k] * width_;
      for (int64_t d = 0; d < width_; ++d) residual_[d] += mean_[d] - picked[d];
    }
  }

 private:
  int64_t width_;
  std::vector<double> mean_, residual_, unit_, own_, score_;

  template <typename scalar_t>
  void normalise(const scalar_t* features, int64_t count) {
    unit_.resize(count * width_);
    own_.resize(count);
    score_.resize(count);
    std::fill(mean_.begin(), mean_.end(), 0.0);
    for (int64_t i = 0; i < count; ++i) {
      double* row = unit_.data() + i * width_;
      for (int64_t d = 0; d < width_; ++d) row[d] = static_cast<double>(features[i * width_ + d]);
      const double norm = std::max(std::sqrt(dot(row, row, width_)), kSmallest);
      for (int64_t d = 0; d < width_; ++d) mean_[d] += row[d] /= norm;
      own_[i] = dot(row, row, width_);
    }
    for (int64_t d = 0; d < width_; ++d) residual_[d] = mean_[d] /= static_cast<double>(count);
  }

  // The first of the candidates that are equally near but for rounding.
  int64_t nearest(int64_t count) {
    double least = kNever;
    for (int64_t i = 0; i < count; ++i) {
      if (own_[i] == kNever) {
        score_[i] = kNever;
        continue;
      }
      score_[i] = own_[i] - 2 * dot(unit_.data() + i * width_, residual_.data(), width_);
      least = std::min(least, score_[i]);
    }
    // Not even features that are not numbers lead beyond the last.
    int64_t i = 0;
    while (i + 1 < count && !(score_[i] <= least + kTie)) ++i;
    return i;
  }
};

at::Tensor herding_cpu(const at::Tensor& features, const at::Tensor& starts, int64_t limit) {
  const auto rows = features.contiguous();
  const auto begins = starts.contiguous();
  const int64_t classes = begins.size(0) - 1, width = rows.size(1);
  const int64_t* first = begins.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < classes; ++k) {
    TORCH_CHECK_VALUE(first[k] >= 0 && first[k] <= first[k + 1] && first[k + 1] <= rows.size(0),
                      "starts[", k, "] is ", first[k], " and the next ", first[k + 1],
                      "; they must ascend from 0 to ", rows.size(0), ", the rows of features");
  }
  at::Tensor order = at::full({classes, limit}, -1, begins.options());
  int64_t* out = order.mutable_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "herding", [&] {
    const scalar_t* data = rows.const_data_ptr<scalar_t>();
    at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
      Herder herder(width);
      for (int64_t k = begin; k < end; ++k) {
        herder.herd(data + first[k] * width, first[k + 1] - first[k], limit, out + k * limit);
      }
    });
  });
  return order;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("herding", &herding_cpu); }

}  // namespace fastcil
