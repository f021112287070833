// fastcil::spectral_gram_ on the CPU: transforms, and products at every frequency.
//
// Two images are transformed as one, the first as real and the second as imaginary part. The
// products of the two at opposite frequencies, one of them conjugated, add up to twice those of
// both images (what is mixed cancels), so they are never taken apart.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "fourier.h"
#include "products.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

// Where the values of the frequencies of one transform go.
struct Frequencies {
  struct Place {
    int64_t offset;  // of the frequency's samples, in rows of all panels
    bool second;     // of two opposite frequencies
    bool own;        // its own opposite: real
  };

  int64_t rows, columns;
  std::vector<Place> places;     // [rows * columns]
  std::vector<int64_t> offsets;  // of each frequency kept, and the end
  std::vector<bool> own;         // of each frequency kept

  Frequencies(int64_t rows, int64_t columns, int64_t images) : rows(rows), columns(columns) {
    places.resize(rows * columns);
    offsets.push_back(0);
    for (int64_t at = 0; at < rows * columns; ++at) {
      const int64_t y = at / columns, x = at % columns;
      const int64_t opposite = (rows - y) % rows * columns + (columns - x) % columns;
      if (opposite < at) {
        places[at] = {places[opposite].offset, true, false};
      } else {
        places[at] = {offsets.back(), false, opposite == at};
        own.push_back(opposite == at);
        offsets.push_back(offsets.back() + (opposite == at ? images : 2 * images));
      }
    }
  }

  int64_t kept() const { return static_cast<int64_t>(own.size()); }
  int64_t samples() const { return offsets.back(); }
};

// Samples of some frequencies of one group of signals: [frequency][panel][sample][kTile].
template <typename T>
struct Samples {
  const Frequencies& frequencies;
  int64_t panels;
  int64_t begin, end;  // which of the frequencies kept
  T* data;

  int64_t size() const {
    return (frequencies.offsets[end] - frequencies.offsets[begin]) * panels * kTile;
  }

  T* at(int64_t offset, int64_t rows, int64_t panel) const {
    return data + ((offset - frequencies.offsets[begin]) * panels + panel * rows) * kTile;
  }

  // The value of one frequency in one panel, of a pair of images.
  C10_ALWAYS_INLINE void put(int64_t place, int64_t images, int64_t pair, int64_t panel,
                             const T* value) const {
    const auto& to = frequencies.places[place];
    if (to.offset < frequencies.offsets[begin] || to.offset >= frequencies.offsets[end]) return;
    if (to.own) {
      std::copy_n(value, 2 * kTile, at(to.offset, images, panel) + 2 * pair * kTile);
      return;
    }
    T* sample = at(to.offset, 2 * images, panel) + (4 * pair + 2 * to.second) * kTile;
    std::copy_n(value, kTile, sample);
    const T sign = to.second ? -1 : 1;
    for (int64_t c = 0; c < kTile; ++c) sample[kTile + c] = sign * value[kTile + c];
  }
};

// Reads a panel of two images row by row, transforms it, and hands out what belongs where.
template <typename T>
class Transformer {
 public:
  Transformer(const T* x, at::IntArrayRef sizes, at::IntArrayRef strides, const T* scales,
              const Samples<T>& whole, std::array<Samples<T>, 2> rows,
              std::array<Samples<T>, 2> columns, std::array<Samples<T>, 4> corners, int64_t ty,
              int64_t tx)
      : x_(x), scales_(scales), images_(sizes[0]), channels_(sizes[1]), height_(sizes[2]),
        width_(sizes[3]), strides_(strides), whole_(whole), rows_(rows), columns_(columns),
        corners_(corners), ty_(ty), tx_(tx), along_y_(whole.frequencies.rows),
        along_x_(whole.frequencies.columns),
        padded_((images_ + 1) / 2 * 2),
        panels_((channels_ + kTile - 1) / kTile),
        spectrum_(along_x_.length() * height_ * kElement),
        bands_(2 * tx * height_ * kElement),
        first_(std::max(along_x_.length(), along_y_.length()) * kElement),
        second_(first_.size()) {}

  void operator()(int64_t pair, int64_t panel) {
    for (int64_t y = 0; y < height_; ++y) {
      read(pair, panel, y);
      keep_columns(pair, panel, y);
      clear(width_, along_x_.length());
      const T* line = along_x_(first_.data(), second_.data());
      for (int64_t f = 0; f < along_x_.length(); ++f) {
        std::copy_n(line + f * kElement, kElement, spectrum_.data() + (f * height_ + y) * kElement);
      }
      if (y < ty_) put_line(rows_[0], pair, y * panels_ + panel, line);
      if (y >= height_ - ty_) put_line(rows_[1], pair, (y - height_ + ty_) * panels_ + panel, line);
    }
    for (int64_t f = 0; f < along_x_.length(); ++f) {
      const T* line = along_y(spectrum_.data() + f * height_ * kElement);
      for (int64_t g = 0; g < along_y_.length(); ++g) {
        whole_.put(g * along_x_.length() + f, padded_, pair, panel, line + g * kElement);
      }
    }
    for (int64_t band = 0; band < 2 * tx_; ++band) {
      const T* line = along_y(bands_.data() + band * height_ * kElement);
      put_line(columns_[band / tx_], pair, band % tx_ * panels_ + panel, line);
    }
  }

 private:
  static constexpr int64_t kElement = Fourier<T>::kElement;

  const T* x_;
  const T* scales_;
  int64_t images_, channels_, height_, width_;
  at::IntArrayRef strides_;
  Samples<T> whole_;
  std::array<Samples<T>, 2> rows_, columns_;
  std::array<Samples<T>, 4> corners_;
  int64_t ty_, tx_;
  Fourier<T> along_y_, along_x_;
  int64_t padded_, panels_;
  std::vector<T> spectrum_;  // [frequency along x][height]
  std::vector<T> bands_;     // [left, right][tx][height]
  std::vector<T> first_, second_;

  // A row of both images, and zeros where there is no image or no channel, to first_.
  void read(int64_t pair, int64_t panel, int64_t y) {
    const int64_t channels = std::min(kTile, channels_ - panel * kTile);
    for (int64_t part = 0; part < 2; ++part) {
      const int64_t image = 2 * pair + part;
      T* to = first_.data() + part * kTile;
      if (image >= images_ || channels < kTile) {
        for (int64_t j = 0; j < width_; ++j) std::fill_n(to + j * kElement, kTile, T(0));
        if (image >= images_) continue;
      }
      const T scale = scales_ ? scales_[image] : T(1);
      const T* from = x_ + image * strides_[0] + panel * kTile * strides_[1] + y * strides_[2];
      for (int64_t c = 0; c < channels; ++c) {
        const T* plane = from + c * strides_[1];
        for (int64_t j = 0; j < width_; ++j) to[j * kElement + c] = scale * plane[j * strides_[3]];
      }
    }
  }

  void clear(int64_t from, int64_t to) {
    std::fill_n(first_.data() + from * kElement, (to - from) * kElement, T(0));
  }

  // What the bands of columns and the corners need of the row in first_.
  void keep_columns(int64_t pair, int64_t panel, int64_t y) {
    for (int64_t band = 0; band < 2 * tx_; ++band) {
      const int64_t side = band / tx_, q = band % tx_;
      const T* value = first_.data() + (side ? width_ - tx_ + q : q) * kElement;
      std::copy_n(value, kElement, bands_.data() + (band * height_ + y) * kElement);
      if (y < ty_) corners_[side].put(0, padded_, pair, (y * tx_ + q) * panels_ + panel, value);
      if (y >= height_ - ty_) {
        const int64_t r = y - height_ + ty_;
        corners_[2 + side].put(0, padded_, pair, (r * tx_ + q) * panels_ + panel, value);
      }
    }
  }

  const T* along_y(const T* column) {
    std::copy_n(column, height_ * kElement, first_.data());
    clear(height_, along_y_.length());
    return along_y_(first_.data(), second_.data());
  }

  void put_line(const Samples<T>& to, int64_t pair, int64_t panel, const T* line) {
    const int64_t length = static_cast<int64_t>(to.frequencies.places.size());
    for (int64_t f = 0; f < length; ++f) to.put(f, padded_, pair, panel, line + f * kElement);
  }
};

// Adds the products of all frequencies of a group to its state.
template <typename T>
void add_products(const Samples<T>& samples, T* state, T decay) {
  const auto& frequencies = samples.frequencies;
  const int64_t panels = samples.panels, tile = kTile * kTile;
  at::parallel_for(samples.begin * panels, samples.end * panels, 1, [&](int64_t begin,
                                                                        int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t f = at / panels, i = at % panels;
      const int64_t offset = frequencies.offsets[f], rows = frequencies.offsets[f + 1] - offset;
      const T* left = samples.at(offset, rows, i);
      T* to = state + at * panels * tile;
      for (int64_t j = 0; j < (frequencies.own[f] ? i + 1 : panels); ++j, to += tile) {
        const T* right = samples.at(offset, rows, j);
        if (i > j) {
          Products<T>::real(to, kTile, left, right, rows, decay);
        } else if (i < j) {
          Products<T>::imaginary(to, kTile, left, right, rows / 2, decay);
        } else {
          T real[tile] = {}, imaginary[tile] = {};
          Products<T>::real(real, kTile, left, right, rows, T(0));
          if (!frequencies.own[f]) {
            Products<T>::imaginary(imaginary, kTile, left, right, rows / 2, T(0));
          }
          for (int64_t r = 0; r < kTile; ++r) {
            for (int64_t c = 0; c < kTile; ++c) {
              const int64_t k = r * kTile + c;
              to[k] = decay * to[k] + (c <= r ? real[k] : imaginary[k]);
            }
          }
        }
      }
    }
  });
}

// All groups of signals, of which a part of the frequencies at a time is transformed and added.
template <typename T>
class Adder {
 public:
  Adder(at::Tensor& whole, at::Tensor& rows, at::Tensor& columns, at::Tensor& corners,
        const at::Tensor& x, const T* scales, at::IntArrayRef size, at::IntArrayRef border)
      : x_(x), scales_(scales), images_((x.size(0) + 1) / 2 * 2),
        panels_((x.size(1) + kTile - 1) / kTile), ty_(border[0]), tx_(border[1]),
        both_(size[0], size[1], images_), along_x_(1, size[1], images_),
        along_y_(1, size[0], images_), none_(1, 1, images_) {
    groups_.push_back({both_, 1, whole.mutable_data_ptr<T>()});
    add_groups(along_x_, ty_, rows, 2);
    add_groups(along_y_, tx_, columns, 2);
    add_groups(none_, ty_ * tx_, corners, 4);
  }

  // Where there are many channels their products take so much longer than the transforms that
  // these may be made twice, each time for half of the frequencies: samples then take half the
  // memory.
  void operator()(T decay) const {
    if (panels_ < kManyPanels) {
      add(0, both_.kept(), true, decay);
      return;
    }
    const int64_t bands = 2 * (along_x_.samples() * ty_ + along_y_.samples() * tx_);
    const int64_t rest = (both_.samples() - bands) / 2;
    const auto& offsets = both_.offsets;
    const int64_t middle = std::lower_bound(offsets.begin(), offsets.end(), rest) - offsets.begin();
    add(0, middle, true, decay);
    add(middle, both_.kept(), false, decay);
  }

 private:
  static constexpr int64_t kManyPanels = 16;

  struct Group {
    const Frequencies& frequencies;
    int64_t stacked;
    T* state;
  };

  const at::Tensor& x_;
  const T* scales_;
  int64_t images_, panels_, ty_, tx_;
  Frequencies both_, along_x_, along_y_, none_;
  std::vector<Group> groups_;  // whole; top, bottom; left, right; the corners

  void add_groups(const Frequencies& frequencies, int64_t stacked, at::Tensor& state, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      T* own = state.mutable_data_ptr<T>() + state.numel() / count * k;
      groups_.push_back({frequencies, stacked, own});
    }
  }

  // Frequencies [begin, end) of whole images, and the bands if so.
  void add(int64_t begin, int64_t end, bool bands, T decay) const {
    std::vector<Samples<T>> samples;
    int64_t size = 0;
    for (const auto& group : groups_) {
      const bool whole = samples.empty();
      const int64_t last = whole ? end : bands ? group.frequencies.kept() : 0;
      samples.push_back(
          {group.frequencies, group.stacked * panels_, whole ? begin : 0, last, nullptr});
      size += samples.back().size();
    }
    const auto memory = recycled_empty({size}, x_.scalar_type());
    T* next = memory.template mutable_data_ptr<T>();
    for (auto& part : samples) {
      part.data = next;
      next += part.size();
    }
    at::parallel_for(0, images_ / 2 * panels_, 1, [&](int64_t from, int64_t to) {
      Transformer<T> transform(x_.const_data_ptr<T>(), x_.sizes(), x_.strides(), scales_,
                               samples[0], {samples[1], samples[2]}, {samples[3], samples[4]},
                               {samples[5], samples[6], samples[7], samples[8]}, ty_, tx_);
      for (int64_t at = from; at < to; ++at) transform(at / panels_, at % panels_);
    });
    for (size_t k = 0; k < samples.size(); ++k) add_products(samples[k], groups_[k].state, decay);
  }
};

void spectral_gram_cpu(at::Tensor whole, at::Tensor rows, at::Tensor columns, at::Tensor corners,
                       const at::Tensor& x, const std::optional<at::Tensor>& weights, double decay,
                       at::IntArrayRef size, at::IntArrayRef border) {
  const auto scales =
      weights ? weights->to(x.scalar_type()).sqrt().contiguous() : at::Tensor();
  for (const at::Tensor& state : {whole, rows, columns, corners}) {
    TORCH_CHECK_VALUE(state.is_contiguous() && state.scalar_type() == x.scalar_type(),
                      "spectral_gram_ adds to contiguous tensors of the images' dtype");
  }
  if (x.scalar_type() == at::kDouble) {
    const auto* scale = weights ? scales.const_data_ptr<double>() : nullptr;
    Adder<double>(whole, rows, columns, corners, x, scale, size, border)(decay);
  } else {
    const auto* scale = weights ? scales.const_data_ptr<float>() : nullptr;
    Adder<float>(whole, rows, columns, corners, x, scale, size, border)(static_cast<float>(decay));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("spectral_gram_", &spectral_gram_cpu); }

}  // namespace fastcil
