// fastcil::pade, its gradient and its second derivative on the CPU.
//
// A dense tensor is worked through in the order of its memory, whatever its strides, in units of a
// fixed size. Each unit adds up its own share of the coefficients' gradients, in the elements'
// precision over a short stretch and in double beyond; the units are then added in order. So the
// result depends neither on the number of threads nor on which of them did what.
#include "pade.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <type_traits>
#include <vector>

#include "recycled_memory.h"

namespace fastcil {
namespace {

constexpr int64_t kBlock = 1024;   // elements of one call of pade_block, at most
constexpr int64_t kUnit = 8192;    // elements of a unit, about
constexpr int64_t kLines = 32;     // lines of a unit, where coefficients are spread over a line
constexpr int64_t kShortRun = 32;  // they are where runs are shorter than this

// The form, and where each group is: element i of the memory belongs to group (i / run) % groups.
struct Shape {
  AnyForm form;
  int64_t numel, groups, run;

  int64_t sums() const { return form.m + 1 + form.n; }
};

template <typename T>
using BlockFunction = void (*)(const AnyForm&, const PadeBlock<T>&);

template <class Op, bool Spread, typename T>
BlockFunction<T> near_block(const AnyForm& form) {
  if constexpr (std::is_same_v<T, float>) {
    if (form.m == 5 && form.n == 4) {
      switch (form.version) {
        case PadeVersion::A:
          return pade_block<Op, true, Spread, FixedForm<5, 4, PadeVersion::A>, T>;
        case PadeVersion::B:
          return pade_block<Op, true, Spread, FixedForm<5, 4, PadeVersion::B>, T>;
        case PadeVersion::C:
          return pade_block<Op, true, Spread, FixedForm<5, 4, PadeVersion::C>, T>;
        case PadeVersion::nonsafe:
          return pade_block<Op, true, Spread, FixedForm<5, 4, PadeVersion::nonsafe>, T>;
      }
    }
  }
  return pade_block<Op, true, Spread, AnyForm, T>;
}

// Elements of type I as T, and zeros that fill up the last vector.
template <typename I, typename T>
void load(const I* from, int64_t count, T* to) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<I, T>) {
    constexpr int64_t V = Vec<I>::size();
    for (; i + V <= count; i += V) {
      const auto [low, high] = at::vec::convert_to_float<I>(Vec<I>::loadu(from + i));
      low.store(to + i);
      high.store(to + i + V / 2);
    }
  }
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
  for (; i % Vec<T>::size(); ++i) to[i] = T(0);
}

template <typename I, typename T>
void save(const T* from, int64_t count, I* to) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<I, T>) {
    constexpr int64_t V = Vec<I>::size();
    for (; i + V <= count; i += V) {
      const auto low = Vec<T>::loadu(from + i), high = Vec<T>::loadu(from + i + V / 2);
      at::vec::convert_from_float<I>(low, high).store(to + i);
    }
  }
  for (; i < count; ++i) to[i] = static_cast<I>(from[i]);
}

// One call of an operation on elements of type I.
template <class Op, typename I>
class Call {
 public:
  using T = at::opmath_type<I>;

  // `rows` are the operation's coefficients, one group's after the other's.
  Call(const Shape& shape, std::array<const I*, 3> in, std::array<I*, 2> out, std::vector<T> rows)
      : shape_(shape),
        in_(in),
        out_(out),
        rows_(std::move(rows)),
        row_count_(Op::rows(shape.form)),
        sum_count_(Op::kSums ? shape.sums() : 0) {}

  // Adds to the sums of each group, [groups, m + 1 + n].
  void run(double* sums) const {
    if (shape_.numel > 0) (shape_.run < kShortRun ? run_spread(sums) : run_long(sums));
  }

 private:
  static constexpr int V = Vec<T>::size();

  struct Buffers {
    alignas(64) T in[Op::kIn][kBlock];
    alignas(64) T out[Op::kOut][kBlock];
  };

  // Elements begin ... begin + count - 1, at most kBlock.
  template <bool Spread>
  void apply(Buffers& buffers, int64_t begin, int64_t count, const T* rows, T* sums) const {
    PadeBlock<T> block{{}, {}, at::divup(count, V), rows, sums};
    const bool in_place = std::is_same_v<I, T> && count % V == 0;
    for (int j = 0; j < Op::kIn; ++j) {
      if (!in_place) load(in_[j] + begin, count, buffers.in[j]);
      block.in[j] = in_place ? reinterpret_cast<const T*>(in_[j] + begin) : buffers.in[j];
    }
    for (int j = 0; j < Op::kOut; ++j) {
      block.out[j] = in_place ? reinterpret_cast<T*>(out_[j] + begin) : buffers.out[j];
    }
    const auto function = all_near(block) ? near_block<Op, Spread, T>(shape_.form)
                                          : pade_block<Op, false, Spread, AnyForm, T>;
    function(shape_.form, block);
    for (int j = 0; j < Op::kOut && !in_place; ++j) save(buffers.out[j], count, out_[j] + begin);
  }

  // Runs that are long enough for one group's coefficients in all lanes. A unit is a piece of one
  // run, or one group's run in several periods.
  void run_long(double* sums) const {
    const int64_t groups = shape_.groups, run = shape_.run, periods = shape_.numel / (groups * run);
    const int64_t pieces = at::divup(run, kUnit), deep = std::max<int64_t>(1, kUnit / run);
    const int64_t units = at::divup(periods, deep) * groups * pieces;
    std::vector<double> shares(units * sum_count_);
    at::parallel_for(0, units, 4, [&](int64_t from, int64_t to) {
      Buffers buffers;
      std::vector<T> rows(row_count_ * V), lanes(sum_count_ * V);
      std::vector<double> total(sum_count_ * V);
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t group = unit / pieces % groups, period = unit / pieces / groups * deep;
        const int64_t begin = unit % pieces * kUnit, end = std::min(begin + kUnit, run);
        for (int64_t i = 0; i < row_count_ * V; ++i) rows[i] = rows_[group * row_count_ + i / V];
        int64_t pending = 0;
        for (int64_t p = period; p < std::min(period + deep, periods); ++p) {
          for (int64_t i = begin; i < end; i += kBlock) {
            const int64_t count = std::min(kBlock, end - i);
            if (pending + count > kBlock) {
              flush(lanes, total);
              pending = 0;
            }
            pending += count;
            apply<false>(buffers, (p * groups + group) * run + i, count, rows.data(), lanes.data());
          }
        }
        flush(lanes, total);
        for (int64_t i = 0; i < sum_count_ * V; ++i) shares[unit * sum_count_ + i / V] += total[i];
        std::fill(total.begin(), total.end(), 0.0);
      }
    });
    for (int64_t i = 0; i < units * sum_count_; ++i) {
      sums[i / sum_count_ / pieces % groups * sum_count_ + i % sum_count_] += shares[i];
    }
  }

  static void flush(std::vector<T>& lanes, std::vector<double>& total) {
    for (size_t i = 0; i < lanes.size(); ++i) total[i] += lanes[i];
    std::fill(lanes.begin(), lanes.end(), T(0));
  }

  // Short runs: lines of whole periods and whole vectors, each lane with its group's coefficients.
  void run_spread(double* sums) const {
    const int64_t groups = shape_.groups, period = groups * shape_.run;
    const int64_t least = std::lcm<int64_t>(period, V);
    const int64_t width = at::divup(kBlock, least) * least;
    const int64_t units = at::divup(shape_.numel, kLines * width);
    std::vector<int64_t> group(width);
    for (int64_t i = 0; i < width; ++i) group[i] = i / shape_.run % groups;
    std::vector<T> rows(width * row_count_);
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t k = 0; k < row_count_; ++k) {
        rows[(i / V * row_count_ + k) * V + i % V] = rows_[group[i] * row_count_ + k];
      }
    }
    std::vector<double> shares(units * groups * sum_count_);
    at::parallel_for(0, units, 1, [&](int64_t from, int64_t to) {
      Buffers buffers;
      std::vector<T> lanes(width * sum_count_);
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t begin = unit * kLines * width;
        const int64_t end = std::min(begin + kLines * width, shape_.numel);
        for (int64_t line = begin; line < end; line += width) {
          for (int64_t i = 0; i < std::min(width, end - line); i += kBlock) {
            const int64_t count = std::min({kBlock, width - i, end - line - i});
            apply<true>(buffers, line + i, count, rows.data() + i * row_count_,
                        lanes.data() + i * sum_count_);
          }
        }
        for (int64_t i = 0; i < width; ++i) {
          const T* lane = lanes.data() + i / V * sum_count_ * V + i % V;
          double* share = shares.data() + (unit * groups + group[i]) * sum_count_;
          for (int64_t k = 0; k < sum_count_; ++k) share[k] += lane[k * V];
        }
        std::fill(lanes.begin(), lanes.end(), T(0));
      }
    });
    for (size_t i = 0; i < shares.size(); ++i) sums[i % (groups * sum_count_)] += shares[i];
  }

  const Shape shape_;
  const std::array<const I*, 3> in_;
  const std::array<I*, 2> out_;
  const std::vector<T> rows_;
  const int64_t row_count_, sum_count_;
};

AnyForm form_of(int64_t m, int64_t n, std::string_view version) {
  constexpr std::array<std::string_view, 4> names = {"A", "B", "C", "nonsafe"};
  const auto found = std::find(names.begin(), names.end(), version);
  TORCH_CHECK_VALUE(found != names.end(), "version is '", version, "'; give A, B, C or nonsafe");
  TORCH_CHECK_VALUE(m >= 0 && m <= kMostDegree && n >= 1 && n <= kMostDegree, "the degrees are (",
                    m, ", ", n, "); they may be (0, 1) to (", kMostDegree, ", ", kMostDegree, ")");
  return {static_cast<int>(m), static_cast<int>(n),
          static_cast<PadeVersion>(found - names.begin())};
}

Shape shape_of(const at::Tensor& x, const at::Tensor& numerator, const at::Tensor& denominator,
               std::string_view version) {
  const int64_t dim = numerator.dim();
  TORCH_CHECK_VALUE((dim == 1 || dim == 2) && denominator.dim() == dim &&
                        (dim == 1 || numerator.size(0) == denominator.size(0)),
                    "numerator and denominator have shapes ", numerator.sizes(), " and ",
                    denominator.sizes(), "; give [m + 1] and [n], or [G, m + 1] and [G, n]");
  const int64_t groups = dim == 1 ? 1 : numerator.size(0), numel = x.numel();
  TORCH_CHECK_VALUE(dim == 1 || (groups > 0 && x.dim() >= 2 && x.size(1) % groups == 0),
                    "x has shape ", x.sizes(), "; its channels must be a multiple of ", groups);
  const AnyForm form = form_of(numerator.size(-1) - 1, denominator.size(-1), version);
  if (groups == 1 || numel == 0) return {form, numel, groups, numel};
  // In whatever order a dense tensor has its dimensions, stride(1) elements in a row are of one
  // channel, and after them come those of the next.
  return {form, numel, groups, x.stride(1) * (x.size(1) / groups)};
}

at::Tensor dense(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
}

// The tensor with the dtype of `like`, itself dense, and in its order.
at::Tensor arranged(const at::Tensor& tensor, const at::Tensor& like) {
  bool same = tensor.scalar_type() == like.scalar_type();
  for (int64_t i = 0; i < like.dim() && same; ++i) {
    same = like.size(i) == 1 || tensor.stride(i) == like.stride(i);
  }
  return same ? tensor : at::empty_like(like).copy_(tensor);
}

// The coefficients that an operation's `rows` describes.
template <class Op, typename T>
std::vector<T> coefficients(const Shape& shape, const at::Tensor& numerator,
                            const at::Tensor& denominator, const at::Tensor& da,
                            const at::Tensor& db) {
  const auto values = [](const at::Tensor& tensor) {
    const at::Tensor held = tensor.to(c10::CppTypeToScalarType<T>::value).contiguous();
    const T* data = held.template const_data_ptr<T>();
    return std::vector<T>(data, data + held.numel());
  };
  const int m = shape.form.m, n = shape.form.n;
  const std::vector<T> a = values(numerator), along_a = values(da);
  std::vector<T> b = values(denominator), along_b = values(db);
  if (shape.form.absolute_terms()) {
    for (size_t i = 0; i < b.size(); ++i) {
      along_b[i] *= (b[i] > 0) - (b[i] < 0);
      b[i] = std::abs(b[i]);
    }
  }
  std::vector<T> rows;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t from = group * (m + 1), from_b = group * n;
    rows.insert(rows.end(), a.begin() + from, a.begin() + from + m + 1);
    rows.insert(rows.end(), b.begin() + from_b, b.begin() + from_b + n);
    if constexpr (std::is_same_v<Op, PadeBackward>) {
      for (int k = 1; k <= m; ++k) rows.push_back(k * a[from + k]);
      for (int k = 1; k <= n; ++k) rows.push_back(-k * b[from_b + k - 1]);
    } else if constexpr (std::is_same_v<Op, PadeDoubleBackward>) {
      rows.insert(rows.end(), along_a.begin() + from, along_a.begin() + from + m + 1);
      rows.insert(rows.end(), along_b.begin() + from_b, along_b.begin() + from_b + n);
    }
  }
  return rows;
}

// Runs an operation on dense x and tensors arranged like it; returns its sums, [groups, m + 1 + n].
template <class Op>
at::Tensor call(const Shape& shape, const std::vector<at::Tensor>& in,
                const std::vector<at::Tensor>& out, const at::Tensor& numerator,
                const at::Tensor& denominator, const at::Tensor& da, const at::Tensor& db) {
  const at::Tensor sums =
      at::zeros({shape.groups, shape.sums()}, numerator.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in[0].scalar_type(), "pade", [&] {
    using T = typename Call<Op, scalar_t>::T;
    std::array<const scalar_t*, 3> from{};
    std::array<scalar_t*, 2> to{};
    for (size_t i = 0; i < in.size(); ++i) from[i] = in[i].const_data_ptr<scalar_t>();
    for (size_t i = 0; i < out.size(); ++i) to[i] = out[i].mutable_data_ptr<scalar_t>();
    auto rows = coefficients<Op, T>(shape, numerator, denominator, da, db);
    Call<Op, scalar_t>(shape, from, to, std::move(rows)).run(sums.mutable_data_ptr<double>());
  });
  return sums;
}

// The sums as gradients of the coefficients.
std::tuple<at::Tensor, at::Tensor> gradients(const Shape& shape, const at::Tensor& sums,
                                             const at::Tensor& numerator,
                                             const at::Tensor& denominator) {
  const int64_t m = shape.form.m, n = shape.form.n;
  const at::Tensor a = sums.narrow(1, 0, m + 1).reshape(numerator.sizes());
  at::Tensor b = sums.narrow(1, m + 1, n).reshape(denominator.sizes());
  b = shape.form.absolute_terms() ? b.mul(denominator.sign().neg()) : b.neg();
  return {at::empty_like(numerator).copy_(a), at::empty_like(denominator).copy_(b)};
}

at::Tensor pade_cpu(const at::Tensor& given, const at::Tensor& numerator,
                    const at::Tensor& denominator, std::string_view version) {
  const at::Tensor x = dense(given), y = recycled_like(x);
  const Shape shape = shape_of(x, numerator, denominator, version);
  call<PadeForward>(shape, {x}, {y}, numerator, denominator, numerator, denominator);
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pade_backward_cpu(
    const at::Tensor& gradient, const at::Tensor& given, const at::Tensor& numerator,
    const at::Tensor& denominator, std::string_view version) {
  const at::Tensor x = dense(given), out = recycled_like(x);
  const Shape shape = shape_of(x, numerator, denominator, version);
  const at::Tensor sums = call<PadeBackward>(shape, {x, arranged(gradient, x)}, {out}, numerator,
                                             denominator, numerator, denominator);
  const auto [grad_a, grad_b] = gradients(shape, sums, numerator, denominator);
  return {out, grad_a, grad_b};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pade_double_backward_cpu(
    const at::Tensor& dx, const at::Tensor& da, const at::Tensor& db, const at::Tensor& gradient,
    const at::Tensor& given, const at::Tensor& numerator, const at::Tensor& denominator,
    std::string_view version) {
  const at::Tensor x = dense(given), phi = recycled_like(x), out = recycled_like(x);
  const Shape shape = shape_of(x, numerator, denominator, version);
  const at::Tensor sums =
      call<PadeDoubleBackward>(shape, {x, arranged(gradient, x), arranged(dx, x)}, {phi, out},
                               numerator, denominator, da, db);
  const auto [grad_a, grad_b] = gradients(shape, sums, numerator, denominator);
  const bool same = gradient.strides() == x.strides() && gradient.dtype() == x.dtype();
  return {same ? phi : at::empty_like(gradient).copy_(phi), out, grad_a, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) {
  m.impl("pade", &pade_cpu);
  m.impl("pade_backward", &pade_backward_cpu);
  m.impl("pade_double_backward", &pade_double_backward_cpu);
}

}  // namespace fastcil
