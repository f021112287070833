// fastcil::soft_compose and its gradient on the CPU, row by row of each image.
//
// With M the map upsampled, d the image downsampled and upsampled again, and g the gradient of the
// result: that of the image is M g, and to each pixel that others show comes their (1 - M) g; that
// of M is g (x - d), summed over channels. Images are planes of rows: one plane if channels_last.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "bilinear.h"
#include "lanes.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

// Nearest neighbours along one side: cell k holds pixel source(k) and is shown by those from
// start(k) to start(k + 1), which may be the next one after the source.
struct Cells {
  int64_t side, count;

  Cells(int64_t side, double ratio)
      : side(side),
        count(std::max<int64_t>(1, static_cast<int64_t>(std::floor(side / std::sqrt(ratio))))) {}

  int64_t source(int64_t k) const { return k * side / count; }
  int64_t start(int64_t k) const { return (k * side + count - 1) / count; }
  int64_t shown(int64_t pixel) const { return source(pixel * count / side); }
};

// What images of one shape have in common.
template <typename working_t>
struct Plan {
  int64_t planes, height, width, channels;  // channels of one plane
  int64_t map_height, map_width;
  Cells cells;
  Stretch<working_t> rows;
  std::vector<Tap<working_t>> columns;
  std::vector<int64_t> shown;  // along a row

  Plan(const at::Tensor& images, const at::Tensor& cam, double ratio)
      : planes(images.is_contiguous() ? images.size(1) : 1),
        height(images.size(2)),
        width(images.size(3)),
        channels(images.size(1) / planes),
        map_height(cam.size(1)),
        map_width(cam.size(2)),
        cells(height, ratio),
        rows(map_height, height),
        columns(width),
        shown(width * channels) {
    const Cells across(width, ratio);
    const Stretch<working_t> stretch(map_width, width);
    for (int64_t x = 0; x < width; ++x) {
      columns[x] = stretch.tap(x);
      for (int64_t c = 0; c < channels; ++c) {
        shown[x * channels + c] = across.shown(x) * channels + c;
      }
    }
  }

  int64_t length() const { return width * channels; }
  int64_t image() const { return planes * height * length(); }
  int64_t map() const { return map_height * map_width; }
};

// M along one row, from two rows of the map that are stretched already.
template <typename working_t>
struct Mask {
  using Vector = at::vec::Vectorized<working_t>;
  const working_t *upper, *lower;
  Vector weight, rest;

  C10_ALWAYS_INLINE Vector at(int64_t i) const {
    return at::vec::fmadd(Vector::loadu(upper + i), rest, Vector::loadu(lower + i) * weight);
  }
};

// Works on one image after the other, keeping its buffers.
template <typename scalar_t>
class Composer {
 public:
  using working_t = Working<scalar_t>;
  using Vector = Lanes<scalar_t>;

  explicit Composer(const Plan<working_t>& plan)
      : plan_(plan),
        length_(plan.length()),
        padded_((length_ + Vector::size() - 1) / Vector::size() * Vector::size()),
        stretched_(plan.map_height * padded_),
        coarse_(plan.planes * padded_),
        row_(padded_) {}

  void compose(const scalar_t* images, const working_t* cam, scalar_t* out) {
    stretch(cam);
    for (int64_t k = 0; k < plan_.cells.count; ++k) {
      find_coarse(images, k);
      for (int64_t y = plan_.cells.start(k); y < plan_.cells.start(k + 1); ++y) {
        const Mask<working_t> mask = mask_of(y);
        for (int64_t p = 0; p < plan_.planes; ++p) {
          const int64_t row = (p * plan_.height + y) * length_;
          compose_row(mask, images + row, coarse_.data() + p * padded_, out + row);
        }
      }
    }
  }

  void differentiate(const scalar_t* gradient, const scalar_t* images, const working_t* cam,
                     scalar_t* grad_images, working_t* grad_cam) {
    stretch(cam);
    sums_.assign(plan_.map_height * padded_, 0);
    slope_.resize(padded_);
    passed_.resize(plan_.planes * padded_);
    for (int64_t k = 0; k < plan_.cells.count; ++k) {
      find_coarse(images, k);
      std::fill(passed_.begin(), passed_.end(), working_t(0));
      for (int64_t y = plan_.cells.start(k); y < plan_.cells.start(k + 1); ++y) {
        differentiate_row(gradient, images, y);
      }
      // The rows from this source to the next.
      for (int64_t y = plan_.cells.source(k); y < plan_.cells.source(k + 1); ++y) {
        const Mask<working_t> mask = mask_of(y);
        for (int64_t p = 0; p < plan_.planes; ++p) {
          const int64_t row = (p * plan_.height + y) * length_;
          if (y == plan_.cells.source(k)) {
            gather(passed_.data() + p * padded_);
            source_row(mask, gradient + row, grad_images + row);
          } else {
            weighted_row(mask, gradient + row, grad_images + row);
          }
        }
      }
    }
    gather_map(grad_cam);
  }

 private:
  const Plan<working_t>& plan_;
  int64_t length_, padded_;
  std::vector<working_t> stretched_;  // the map's rows, as long as the image's
  std::vector<working_t> coarse_;     // d along the rows of a cell, for each plane
  std::vector<working_t> row_;
  std::vector<working_t> sums_;    // the gradient by each of stretched_
  std::vector<working_t> slope_;   // the gradient by M along a row
  std::vector<working_t> passed_;  // (1 - M) g, summed over the rows of a cell, for each plane

  void stretch(const working_t* cam) {
    for (int64_t i = 0; i < plan_.map_height; ++i, cam += plan_.map_width) {
      working_t* out = stretched_.data() + i * padded_;
      for (const auto& tap : plan_.columns) {
        out = std::fill_n(out, plan_.channels, tap.blend(cam[tap.first], cam[tap.second]));
      }
    }
  }

  Mask<working_t> mask_of(int64_t y) const {
    const auto tap = plan_.rows.tap(y);
    const working_t* rows = stretched_.data();
    return {rows + tap.first * padded_, rows + tap.second * padded_, Vector(tap.weight),
            Vector(1 - tap.weight)};
  }

  void find_coarse(const scalar_t* images, int64_t k) {
    const int64_t* shown = plan_.shown.data();
    for (int64_t p = 0; p < plan_.planes; ++p) {
      const scalar_t* from = images + (p * plan_.height + plan_.cells.source(k)) * length_;
      working_t* out = coarse_.data() + p * padded_;
      for (int64_t i = 0; i < length_; ++i) out[i] = static_cast<working_t>(from[shown[i]]);
    }
  }

  void compose_row(const Mask<working_t>& mask, const scalar_t* row, const working_t* coarse,
                   scalar_t* out) const {
    const Vector one(1), half(0.5);
    sweep<scalar_t>(length_, [=](int64_t i, int64_t count) {
      const Vector m = mask.at(i), rest = one - m;
      const Vector x = get(row + i, count), d = Vector::loadu(coarse + i), difference = d - x;
      // As torch.lerp: from the nearer end, which it then meets exactly.
      const Vector from_image = at::vec::fmadd(rest, difference, x);
      const Vector from_coarse = at::vec::fnmadd(m, difference, d);
      put<scalar_t>(Vector::blendv(from_coarse, from_image, rest.abs() < half), out + i, count);
    });
  }

  void differentiate_row(const scalar_t* gradient, const scalar_t* images, int64_t y) {
    const Mask<working_t> mask = mask_of(y);
    working_t* slope = slope_.data();
    std::fill(slope_.begin(), slope_.end(), working_t(0));
    for (int64_t p = 0; p < plan_.planes; ++p) {
      const int64_t row = (p * plan_.height + y) * length_;
      const scalar_t *along = gradient + row, *own = images + row;
      const working_t* coarse = coarse_.data() + p * padded_;
      working_t* passed = passed_.data() + p * padded_;
      sweep<scalar_t>(length_, [=](int64_t i, int64_t count) {
        const Vector g = get(along + i, count);
        const Vector difference = get(own + i, count) - Vector::loadu(coarse + i);
        at::vec::fmadd(g, difference, Vector::loadu(slope + i)).store(slope + i);
        const Vector sum = Vector::loadu(passed + i) + at::vec::fnmadd(mask.at(i), g, g);
        sum.store(passed + i);
      });
    }
    const auto tap = plan_.rows.tap(y);
    add_row(slope, mask.rest, sums_.data() + tap.first * padded_);
    add_row(slope, mask.weight, sums_.data() + tap.second * padded_);
  }

  void add_row(const working_t* slope, const Vector& weight, working_t* sums) const {
    for (int64_t i = 0; i < padded_; i += Vector::size()) {
      at::vec::fmadd(Vector::loadu(slope + i), weight, Vector::loadu(sums + i)).store(sums + i);
    }
  }

  // Brings what pixels pass on to those they show: into row_.
  void gather(const working_t* passed) {
    const int64_t* shown = plan_.shown.data();
    working_t* row = row_.data();
    std::fill(row_.begin(), row_.end(), working_t(0));
    for (int64_t i = 0; i < length_; ++i) row[shown[i]] += passed[i];
  }

  void source_row(const Mask<working_t>& mask, const scalar_t* gradient, scalar_t* out) const {
    const working_t* more = row_.data();
    sweep<scalar_t>(length_, [=](int64_t i, int64_t count) {
      const Vector g = get(gradient + i, count);
      put<scalar_t>(at::vec::fmadd(mask.at(i), g, Vector::loadu(more + i)), out + i, count);
    });
  }

  void weighted_row(const Mask<working_t>& mask, const scalar_t* gradient, scalar_t* out) const {
    sweep<scalar_t>(length_, [=](int64_t i, int64_t count) {
      put<scalar_t>(mask.at(i) * get(gradient + i, count), out + i, count);
    });
  }

  void gather_map(working_t* grad_cam) const {
    std::fill_n(grad_cam, plan_.map(), working_t(0));
    for (int64_t i = 0; i < plan_.map_height; ++i, grad_cam += plan_.map_width) {
      const working_t* sums = sums_.data() + i * padded_;
      for (const auto& tap : plan_.columns) {
        working_t sum = 0;
        for (int64_t c = 0; c < plan_.channels; ++c) sum += *sums++;
        grad_cam[tap.first] += sum * (1 - tap.weight);
        grad_cam[tap.second] += sum * tap.weight;
      }
    }
  }
};

// One of the two layouts the kernels read, without a copy if it is there already.
at::Tensor dense(const at::Tensor& images) {
  return images.is_contiguous(at::MemoryFormat::ChannelsLast) ? images : images.contiguous();
}

// With the strides of empty_like(like), which a dense `like` has itself.
at::Tensor arranged(const at::Tensor& value, const at::Tensor& like) {
  if (value.strides() == like.strides() && value.scalar_type() == like.scalar_type()) return value;
  return at::empty_like(like).copy_(value);
}

template <typename working_t>
at::Tensor as_map(const at::Tensor& cam) {
  return cam.to(c10::CppTypeToScalarType<working_t>::value).contiguous();
}

at::Tensor soft_compose_cpu(const at::Tensor& images, const at::Tensor& cam, double ratio) {
  if (images.numel() == 0) return at::empty_like(images);
  const auto own = dense(images);
  at::Tensor out = recycled_like(own);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, own.scalar_type(), "soft_compose", [&] {
        using working_t = Working<scalar_t>;
        const auto maps = as_map<working_t>(cam);
        const Plan<working_t> plan(own, maps, ratio);
        const scalar_t* image = own.const_data_ptr<scalar_t>();
        const working_t* map = maps.template const_data_ptr<working_t>();
        scalar_t* composed = out.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, own.size(0), 1, [&plan, image, map, composed](int64_t begin,
                                                                          int64_t end) {
          Composer<scalar_t> composer(plan);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i * plan.image();
            composer.compose(image + at, map + i * plan.map(), composed + at);
          }
        });
      });
  return arranged(out, images);
}

std::tuple<at::Tensor, at::Tensor> soft_compose_backward_cpu(const at::Tensor& gradient,
                                                             const at::Tensor& images,
                                                             const at::Tensor& cam,
                                                             double ratio) {
  if (images.numel() == 0) return {at::empty_like(images), at::zeros_like(cam)};
  const auto own = dense(images);
  at::Tensor grad_images = recycled_like(own), grad_cam;
  const auto along = own.is_contiguous() ? gradient.contiguous()
                                         : gradient.contiguous(at::MemoryFormat::ChannelsLast);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, own.scalar_type(), "soft_compose_backward", [&] {
        using working_t = Working<scalar_t>;
        const auto maps = as_map<working_t>(cam);
        grad_cam = at::empty_like(maps);
        const Plan<working_t> plan(own, maps, ratio);
        const scalar_t* g = along.const_data_ptr<scalar_t>();
        const scalar_t* image = own.const_data_ptr<scalar_t>();
        const working_t* map = maps.template const_data_ptr<working_t>();
        scalar_t* by_image = grad_images.mutable_data_ptr<scalar_t>();
        working_t* by_map = grad_cam.template mutable_data_ptr<working_t>();
        at::parallel_for(0, own.size(0), 1, [&plan, g, image, map, by_image, by_map](
                                                int64_t begin, int64_t end) {
          Composer<scalar_t> composer(plan);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i * plan.image(), at_map = i * plan.map();
            composer.differentiate(g + at, image + at, map + at_map, by_image + at,
                                   by_map + at_map);
          }
        });
      });
  return {arranged(grad_images, images), arranged(grad_cam, cam)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) {
  m.impl("soft_compose", &soft_compose_cpu);
  m.impl("soft_compose_backward", &soft_compose_backward_cpu);
}

}  // namespace fastcil
