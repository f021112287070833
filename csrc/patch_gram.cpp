// fastcil::patch_gram_ on the CPU: a block of patches at a time, in panels of columns, and then the
// tiles of the lower triangle.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "products.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

struct Convolution {
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t outputs(int64_t length, int side) const {
    return (length + 2 * padding[side] - dilation[side] * (kernel[side] - 1) - 1) / stride[side] + 1;
  }
  bool of_points() const {
    return kernel[0] * kernel[1] == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0;
  }
};

// Patches as rows, counted over images and output positions, of which it copies any stretch.
template <typename T>
class Patches {
 public:
  Patches(const at::Tensor& x, const T* scales, const Convolution& convolution)
      : x_(x.const_data_ptr<T>()), scales_(scales), convolution_(convolution),
        channels_(x.size(1)), size_{x.size(2), x.size(3)},
        strides_{x.stride(0), x.stride(1), x.stride(2), x.stride(3)} {
    // Points in a row may be taken for one long line of them.
    if (convolution.of_points() && strides_[2] == size_[1] * strides_[3]) {
      size_[1] *= size_[0];
      size_[0] = 1;
    }
    for (int side = 0; side < 2; ++side) outputs_[side] = convolution.outputs(size_[side], side);
    rows_ = x.size(0) * outputs_[0] * outputs_[1];
    columns_ = channels_ * convolution.kernel[0] * convolution.kernel[1];
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // Rows [begin, end) of a panel of columns, to [row][kTile]; columns that are not there are zeros.
  void copy(int64_t panel, int64_t begin, int64_t end, T* to) const {
    const int64_t first = panel * kTile, count = std::min(kTile, columns_ - first);
    if (count < kTile) std::fill_n(to, (end - begin) * kTile, T(0));
    if (convolution_.of_points() && strides_[1] == 1) {
      for (int64_t row = begin; row < end; ++row, to += kTile) copy_point(row, first, count, to);
      return;
    }
    for (int64_t row = begin; row < end;) {
      // As far as a line of outputs reaches.
      const int64_t stop = std::min(end, (row / outputs_[1] + 1) * outputs_[1]);
      for (int64_t c = 0; c < count; ++c) {
        copy_line(first + c, row, stop, to + (row - begin) * kTile + c);
      }
      row = stop;
    }
  }

 private:
  const T* x_;
  const T* scales_;
  Convolution convolution_;
  int64_t channels_, size_[2], strides_[4], outputs_[2], rows_, columns_;

  T scale(int64_t image) const { return scales_ ? scales_[image] : T(1); }

  void copy_point(int64_t row, int64_t first, int64_t count, T* to) const {
    const int64_t line = row / outputs_[1], image = line / outputs_[0];
    const T* from = x_ + image * strides_[0] + line % outputs_[0] * strides_[2] +
                    row % outputs_[1] * strides_[3] + first;
    const T by = scale(image);
    for (int64_t c = 0; c < count; ++c) to[c] = by * from[c];
  }

  // What one tap of one channel sees from the outputs [begin, end) of a line.
  void copy_line(int64_t column, int64_t begin, int64_t end, T* to) const {
    const int64_t taps = convolution_.kernel[0] * convolution_.kernel[1];
    const int64_t a = column % taps / convolution_.kernel[1], b = column % convolution_.kernel[1];
    const int64_t line = begin / outputs_[1], image = line / outputs_[0];
    const int64_t y = line % outputs_[0] * convolution_.stride[0] - convolution_.padding[0] +
                      a * convolution_.dilation[0];
    const int64_t shift = b * convolution_.dilation[1] - convolution_.padding[1];
    const T* from =
        x_ + image * strides_[0] + column / taps * strides_[1] + y * strides_[2];
    const T by = scale(image);
    const int64_t first = begin % outputs_[1], last = first + end - begin;
    // Where the tap lies in the image: first <= low <= high <= last.
    const int64_t step = convolution_.stride[1];
    int64_t low = last, high = last;
    if (y >= 0 && y < size_[0]) {
      const auto up = [&](int64_t at) { return at <= 0 ? 0 : (at + step - 1) / step; };
      low = std::clamp(up(-shift), first, last);
      high = std::clamp(up(size_[1] - shift), low, last);
    }
    for (int64_t o = first; o < low; ++o, to += kTile) *to = T(0);
    const T* at = from + (low * step + shift) * strides_[3];
    const int64_t jump = step * strides_[3];
    for (int64_t o = low; o < high; ++o, to += kTile, at += jump) *to = by * *at;
    for (int64_t o = high; o < last; ++o, to += kTile) *to = T(0);
  }
};

// A tile of the lower triangle that may reach beyond it.
template <typename T>
void add_at_edge(T* state, int64_t side, int64_t i, int64_t j, const T* a, const T* b,
                 int64_t samples, T decay) {
  T tile[kTile * kTile] = {};
  Products<T>::real(tile, kTile, a, b, samples, T(0));
  for (int64_t r = i * kTile; r < std::min(side, (i + 1) * kTile); ++r) {
    for (int64_t c = j * kTile; c <= std::min(r, (j + 1) * kTile - 1); ++c) {
      T& to = state[r * side + c];
      to = decay * to + tile[(r - i * kTile) * kTile + c - j * kTile];
    }
  }
}

template <typename T>
void add(at::Tensor& state, const Patches<T>& patches, T decay) {
  constexpr int64_t kBlock = 192;  // rows: two panels of them fit into the first cache
  const int64_t side = patches.columns(), panels = (side + kTile - 1) / kTile;
  const int64_t tall = std::min(kBlock, patches.rows());
  const auto memory = recycled_empty({panels * tall * kTile}, state.scalar_type());
  T* block = memory.mutable_data_ptr<T>();
  T* to = state.mutable_data_ptr<T>();
  for (int64_t begin = 0; begin < patches.rows(); begin += tall) {
    const int64_t rows = std::min(tall, patches.rows() - begin);
    const T factor = begin == 0 ? decay : T(1);
    at::parallel_for(0, panels, 1, [&](int64_t from, int64_t end) {
      for (int64_t p = from; p < end; ++p) {
        patches.copy(p, begin, begin + rows, block + p * tall * kTile);
      }
    });
    at::parallel_for(0, panels * (panels + 1) / 2, 1, [&](int64_t from, int64_t end) {
      // Tile number t stands in row i, column j, where t = i (i + 1) / 2 + j.
      int64_t i = static_cast<int64_t>((std::sqrt(8.0 * from + 1) - 1) / 2);
      while (i * (i + 1) / 2 > from) --i;
      while ((i + 1) * (i + 2) / 2 <= from) ++i;
      int64_t j = from - i * (i + 1) / 2;
      for (int64_t t = from; t < end; ++t) {
        const T *a = block + i * tall * kTile, *b = block + j * tall * kTile;
        if (i == j || (i + 1) * kTile > side) {
          add_at_edge(to, side, i, j, a, b, rows, factor);
        } else {
          Products<T>::real(to + i * kTile * side + j * kTile, side, a, b, rows, factor);
        }
        if (++j > i) {
          ++i;
          j = 0;
        }
      }
    });
  }
}

void patch_gram_cpu(at::Tensor state, const at::Tensor& x, const std::optional<at::Tensor>& weights,
                    double decay, at::IntArrayRef kernel, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(state.is_contiguous() && state.scalar_type() == x.scalar_type(),
                    "patch_gram_ adds to a contiguous tensor of the images' dtype");
  if (x.numel() == 0) {
    state.mul_(decay);
    return;
  }
  Convolution convolution;
  for (int side = 0; side < 2; ++side) {
    convolution.kernel[side] = kernel[side];
    convolution.stride[side] = stride[side];
    convolution.padding[side] = padding[side];
    convolution.dilation[side] = dilation[side];
  }
  const auto scales = weights ? weights->to(x.scalar_type()).sqrt().contiguous() : at::Tensor();
  if (x.scalar_type() == at::kDouble) {
    const auto* scale = weights ? scales.const_data_ptr<double>() : nullptr;
    add(state, Patches<double>(x, scale, convolution), decay);
  } else {
    const auto* scale = weights ? scales.const_data_ptr<float>() : nullptr;
    add(state, Patches<float>(x, scale, convolution), static_cast<float>(decay));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("patch_gram_", &patch_gram_cpu); }

}  // namespace fastcil
