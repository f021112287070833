// Discrete Fourier transforms of short lengths, of kTile signals side by side.
//
// An element is kTile real parts and then kTile imaginary parts, so that every operation is one of
// whole vectors and nothing is ever shuffled. Lengths are made of the factors 4, 2, 3 and 5; one
// pass over the data for each factor, by Stockham's scheme, which needs no reordering.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "vec.h"

namespace fastcil {

constexpr int64_t kTile = 16;  // as TILE in fastcil/ops/spectral_gram.py

template <typename T>
class Fourier {
  using Vec = at::vec::Vectorized<T>;

 public:
  static constexpr int64_t kElement = 2 * kTile;

  explicit Fourier(int64_t length) : length_(length) {
    int64_t rest = length;
    for (const int64_t factor : {4, 2, 3, 5}) {
      for (; rest % factor == 0; rest /= factor) factors_.push_back(factor);
    }
    TORCH_CHECK_VALUE(rest == 1, "size has a length of ", length,
                      "; it must be made of the factors 2, 3 and 5");
    int64_t left = length;
    for (const int64_t factor : factors_) {
      for (int64_t p = 0; p < left / factor; ++p) {
        for (int64_t k = 1; k < factor; ++k) {
          const double angle = -2 * M_PI * static_cast<double>(k * p) / static_cast<double>(left);
          twiddles_.push_back(static_cast<T>(std::cos(angle)));
          twiddles_.push_back(static_cast<T>(std::sin(angle)));
        }
      }
      left /= factor;
    }
  }

  int64_t length() const { return length_; }

  // Transforms `a`, using `b` of the same length; the result is in the one that is returned.
  T* operator()(T* a, T* b) const {
    const T* twiddles = twiddles_.data();
    int64_t left = length_, stride = 1;
    for (const int64_t factor : factors_) {
      switch (factor) {
        case 2: pass<2>(a, b, left, stride, twiddles); break;
        case 3: pass<3>(a, b, left, stride, twiddles); break;
        case 4: pass<4>(a, b, left, stride, twiddles); break;
        default: pass<5>(a, b, left, stride, twiddles);
      }
      std::swap(a, b);
      twiddles += left / factor * (factor - 1) * 2;
      left /= factor;
      stride *= factor;
    }
    return a;
  }

 private:
  struct Complex {
    Vec re, im;
    Complex operator+(const Complex& o) const { return {re + o.re, im + o.im}; }
    Complex operator-(const Complex& o) const { return {re - o.re, im - o.im}; }
    Complex times(T scale) const { return {re * Vec(scale), im * Vec(scale)}; }
    Complex plus(T scale, const Complex& o) const {
      return {at::vec::fmadd(Vec(scale), o.re, re), at::vec::fmadd(Vec(scale), o.im, im)};
    }
    // The product with -i.
    Complex turned() const { return {im, re.neg()}; }
    Complex turned_by(T cosine, T sine) const {
      const Vec c(cosine), s(sine);
      return {at::vec::fmadd(c, re, (s * im).neg()), at::vec::fmadd(c, im, s * re)};
    }
  };

  int64_t length_;
  std::vector<int64_t> factors_;
  std::vector<T> twiddles_;

  template <int R>
  static C10_ALWAYS_INLINE void transform(std::array<Complex, R>& z) {
    if constexpr (R == 2) {
      z = {z[0] + z[1], z[0] - z[1]};
    } else if constexpr (R == 3) {
      constexpr T s = 0.86602540378443864676;  // sin(2 pi / 3)
      const Complex sum = z[1] + z[2], turn = (z[1] - z[2]).times(s).turned();
      const Complex mean = z[0].plus(T(-0.5), sum);
      z = {z[0] + sum, mean + turn, mean - turn};
    } else if constexpr (R == 4) {
      const Complex a = z[0] + z[2], b = z[0] - z[2];
      const Complex c = z[1] + z[3], d = (z[1] - z[3]).turned();
      z = {a + c, b + d, a - c, b - d};
    } else {
      constexpr T c1 = 0.30901699437494742410, c2 = -0.80901699437494742410;  // cos(2, 4 pi / 5)
      constexpr T s1 = 0.95105651629515357212, s2 = 0.58778525229247312917;   // sin(2, 4 pi / 5)
      const Complex a = z[1] + z[4], b = z[2] + z[3], c = z[1] - z[4], d = z[2] - z[3];
      const Complex u = z[0].plus(c1, a).plus(c2, b), v = z[0].plus(c2, a).plus(c1, b);
      const Complex e = c.times(s1).plus(s2, d).turned(), f = c.times(s2).plus(-s1, d).turned();
      z = {z[0] + a + b, u + e, v + f, v - f, u - e};
    }
  }

  template <int R>
  static void pass(const T* from, T* to, int64_t length, int64_t stride, const T* twiddles) {
    const int64_t parts = length / R;
    for (int64_t p = 0; p < parts; ++p, twiddles += (R - 1) * 2) {
      for (int64_t q = 0; q < stride; ++q) {
        for (int64_t lane = 0; lane < kTile; lane += Vec::size()) {
          std::array<Complex, R> z;
          for (int j = 0; j < R; ++j) {
            const T* at = from + (q + stride * (p + parts * j)) * kElement + lane;
            z[j] = {Vec::loadu(at), Vec::loadu(at + kTile)};
          }
          transform<R>(z);
          for (int k = 0; k < R; ++k) {
            T* at = to + (q + stride * (R * p + k)) * kElement + lane;
            if (k && p) z[k] = z[k].turned_by(twiddles[2 * k - 2], twiddles[2 * k - 1]);
            z[k].re.store(at);
            z[k].im.store(at + kTile);
          }
        }
      }
    }
  }
};

}  // namespace fastcil
