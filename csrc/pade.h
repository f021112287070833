// The arithmetic of fastcil::pade and its derivatives on vectors of elements, as the references in
// fastcil/ops/pade.py have it: with e_k = x^k s^n and s = 1 / max(1, |x|), P and Q are sums of
// coefficients times e_k, and so are all their derivatives. Here s is 1 as long as x^8 is harmless.
#pragma once

#include <algorithm>

#include "vec.h"

namespace fastcil {

constexpr int kMostDegree = 8;
constexpr double kNear = 64;

enum class PadeVersion { A, B, C, nonsafe };

// Degrees and version, known when the program runs or when it is compiled.
struct AnyForm {
  static constexpr int kMostSums = 2 * kMostDegree + 1;
  int m, n;
  PadeVersion version;

  bool absolute_terms() const { return version == PadeVersion::A; }
  bool absolute_sum() const { return version == PadeVersion::B || version == PadeVersion::C; }
};
template <int M, int N, PadeVersion V>
struct FixedForm {
  static constexpr int kMostSums = M + 1 + N;
  static constexpr int m = M, n = N;
  static constexpr PadeVersion version = V;
  explicit FixedForm(const AnyForm&) {}

  static constexpr bool absolute_terms() { return V == PadeVersion::A; }
  static constexpr bool absolute_sum() { return V == PadeVersion::B || V == PadeVersion::C; }
};

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Work for one call.
template <typename T>
struct PadeBlock {
  const T* in[3];  // x and, for the derivatives, g and dx
  T* out[2];
  int64_t vectors;
  const T* rows;  // vectors of coefficients, as many as the operation's `rows` says
  T* sums;        // vectors to add to: m + 1 for the numerator, n for the denominator
};

// The sign of a number, 0 for 0, in a form that costs no multiplication.
template <typename T>
struct Sign {
  Vec<T> bit, nonzero;

  Sign() = default;
  explicit Sign(const Vec<T>& x) : bit(x & Vec<T>(-0.0)), nonzero(x != Vec<T>(0)) {}
  Vec<T> times(const Vec<T>& value) const { return (value ^ bit) & nonzero; }
};

// Sum of coefficient times monomial, `count` of each.
template <typename T>
inline Vec<T> polynomial(const T* rows, const Vec<T>* monomials, int count) {
  if (count <= 0) return Vec<T>(0);
  Vec<T> total = Vec<T>::loadu(rows) * monomials[0];
  for (int k = 1; k < count; ++k) {
    total = fmadd(Vec<T>::loadu(rows + k * Vec<T>::size()), monomials[k], total);
  }
  return total;
}

// x^k s^n: `e` for the numerator, `d` for the denominator, which may be a polynomial in |x|.
template <typename T>
struct Monomials {
  Vec<T> e[kMostDegree + 1], d[kMostDegree + 1];
  Sign<T> odd;  // what an odd derivative of the denominator brings if it is one

  template <bool Near, class Form>
  C10_ALWAYS_INLINE void fill(const Form& form, const Vec<T>& x) {
    e[0] = Vec<T>(1);
    e[1] = x;
    // One factor at a time: squares of squares would count a rounding several times.
    for (int k = 2; k <= std::max<int>(form.m, form.n); ++k) e[k] = e[k - 1] * x;
    if constexpr (!Near) fill_far(form, x);
    for (int k = 0; k <= form.n; ++k) d[k] = form.absolute_terms() && k % 2 ? e[k].abs() : e[k];
    if (form.absolute_terms()) odd = Sign<T>(x);
  }

 private:
  template <class Form>
  void fill_far(const Form& form, const Vec<T>& x) {
    const Vec<T> size = x.abs(), far = size > Vec<T>(kNear), s = Vec<T>(1) / size, u = x * s;
    Vec<T> shrinking[kMostDegree + 1], power(1), last(1);
    shrinking[0] = power;
    for (int k = 1; k <= form.n; ++k) shrinking[k] = shrinking[k - 1] * s;
    for (int k = 0; k <= std::max<int>(form.m, form.n); ++k) {
      last = k <= form.n ? power * shrinking[form.n - k] : last * x;
      e[k] = Vec<T>::blendv(e[k], last, far);
      power = power * u;
    }
  }
};

// Q, given its sum of b_k d_k.
template <typename T>
struct Denominator {
  Vec<T> q;
  Sign<T> sign;  // what the sum's derivatives bring if Q has its absolute value

  template <class Form>
  Denominator(const Form& form, const Vec<T>& total, const Vec<T>& unit) {
    const Vec<T> constant = Vec<T>(form.version == PadeVersion::C ? 0.1 : 1.0) * unit;
    if (form.absolute_sum()) {
      sign = Sign<T>(total);
      q = total.abs() + constant;
    } else {
      q = total + constant;
    }
  }
};

// One vector of each operation: what it computes and, with `kSums`, its terms of the coefficients'
// gradients, by themselves or added to those of another vector.
struct PadeForward {
  static constexpr int kIn = 1, kOut = 1;
  static constexpr bool kSums = false;
  static int rows(const AnyForm& form) { return form.m + 1 + form.n; }

  template <typename T>
  struct Point {
    Monomials<T> z;
    Vec<T> in[kIn], out[kOut];

    template <class Form>
    C10_ALWAYS_INLINE void compute(const Form& form, const T* rows) {
      const T* b = rows + (form.m + 1) * Vec<T>::size();
      const Vec<T> total = polynomial(b, z.d + 1, form.n);
      out[0] = polynomial(rows, z.e, form.m + 1) / Denominator<T>(form, total, z.e[0]).q;
    }
  };
};

// After a and b, the rows hold k a_k and -k b_k. The denominator's sums lack the factor -sign(b_k).
struct PadeBackward {
  static constexpr int kIn = 2, kOut = 1;
  static constexpr bool kSums = true;
  static int rows(const AnyForm& form) { return 2 * (form.m + form.n) + 1; }

  template <typename T>
  struct Point {
    Monomials<T> z;
    Vec<T> in[kIn], out[kOut];
    Vec<T> share, bent;

    template <class Form>
    C10_ALWAYS_INLINE void compute(const Form& form, const T* rows) {
      constexpr int V = Vec<T>::size();
      const T *b = rows + (form.m + 1) * V, *a1 = b + form.n * V, *b1 = a1 + form.m * V;
      const Vec<T> p = polynomial(rows, z.e, form.m + 1), p1 = polynomial(a1, z.e, form.m);
      const Denominator<T> below(form, polynomial(b, z.d + 1, form.n), z.e[0]);
      const Vec<T> r = Vec<T>(1) / below.q;
      Vec<T> y = p * r;
      if (form.absolute_sum()) y = below.sign.times(y);
      share = in[1] * r;
      bent = y * share;
      if (form.absolute_terms()) y = z.odd.times(y);
      out[0] = fmadd(y, polynomial(b1, z.d, form.n), p1) * share;
    }

    Vec<T> constant() const { return share * z.e[0]; }
    Vec<T> numerator(int k) const { return share * z.e[k]; }
    Vec<T> numerator(int k, const Vec<T>& more) const { return fmadd(share, z.e[k], more); }
    Vec<T> denominator(int k) const { return bent * z.d[k]; }
    Vec<T> denominator(int k, const Vec<T>& more) const { return fmadd(bent, z.d[k], more); }
  };
};

// After a and b, the rows hold the directions da and db (db times the sign of b_k), and the
// denominator's sums lack the factor -sign(b_k).
struct PadeDoubleBackward {
  static constexpr int kIn = 3, kOut = 2;
  static constexpr bool kSums = true;
  static int rows(const AnyForm& form) { return 2 * (form.m + 1 + form.n); }

  template <typename T>
  struct Point {
    Monomials<T> z;
    Vec<T> in[kIn], out[kOut];
    // First and second derivatives of the monomials, at the index of each.
    Vec<T> e1[kMostDegree + 1], e2[kMostDegree + 1], d1[kMostDegree + 1], d2[kMostDegree + 1];
    Vec<T> along, fixed, along_b, bent;

    template <class Form>
    C10_ALWAYS_INLINE void compute(const Form& form, const T* rows) {
      constexpr int V = Vec<T>::size();
      const int m = form.m, n = form.n;
      const Vec<T>&g = in[1], &dx = in[2];
      const T *b = rows + (m + 1) * V, *da = b + n * V, *db = da + (m + 1) * V;
      for (int k = 1; k <= m; ++k) e1[k] = Vec<T>(k) * z.e[k - 1];
      for (int k = 2; k <= m; ++k) e2[k] = Vec<T>(k) * e1[k - 1];
      for (int k = 1; k <= n; ++k) d1[k] = Vec<T>(k) * z.d[k - 1];
      for (int k = 2; k <= n; ++k) d2[k] = Vec<T>(k) * d1[k - 1];

      const Vec<T> p = polynomial(rows, z.e, m + 1), p1 = polynomial(rows + V, e1 + 1, m);
      const Vec<T> p2 = polynomial(rows + 2 * V, e2 + 2, m - 1);
      const Vec<T> a0 = polynomial(da, z.e, m + 1), a1 = polynomial(da + V, e1 + 1, m);
      const Denominator<T> below(form, polynomial(b, z.d + 1, n), z.e[0]);
      Vec<T> q1 = polynomial(b, d1 + 1, n), q2 = polynomial(b + V, d2 + 2, n - 1);
      Vec<T> b0 = polynomial(db, z.d + 1, n), b1 = polynomial(db, d1 + 1, n);
      if (form.absolute_terms()) {
        q1 = z.odd.times(q1);
        b1 = z.odd.times(b1);
      } else if (form.absolute_sum()) {
        q1 = below.sign.times(q1);
        q2 = below.sign.times(q2);
        b0 = below.sign.times(b0);
        b1 = below.sign.times(b1);
      }

      const Vec<T> r = Vec<T>(1) / below.q, y = p * r, y1 = (p1 - y * q1) * r;
      const Vec<T> y2 = (p2 - Vec<T>(2) * y1 * q1 - y * q2) * r, turn = (a0 - y * b0) * r;
      const Vec<T> turn1 = (a1 - y1 * b0 - y * b1 - turn * q1) * r, phi = fmadd(dx, y1, turn);
      out[0] = phi;
      out[1] = g * fmadd(dx, y2, turn1);

      const Vec<T> share = g * r, shift = fmadd(dx, q1, b0) * r;
      along = share * dx;
      fixed = (share * shift).neg();
      along_b = along * y;
      bent = share * (phi - y * shift);
      if (form.absolute_terms()) {
        along_b = z.odd.times(along_b);
      } else if (form.absolute_sum()) {
        along_b = below.sign.times(along_b);
        bent = below.sign.times(bent);
      }
    }

    Vec<T> constant() const { return fixed * z.e[0]; }
    Vec<T> numerator(int k) const { return fmadd(along, e1[k], fixed * z.e[k]); }
    Vec<T> numerator(int k, const Vec<T>& more) const {
      return fmadd(along, e1[k], fmadd(fixed, z.e[k], more));
    }
    Vec<T> denominator(int k) const { return fmadd(along_b, d1[k], bent * z.d[k]); }
    Vec<T> denominator(int k, const Vec<T>& more) const {
      return fmadd(along_b, d1[k], fmadd(bent, z.d[k], more));
    }
  };
};

// Whether no |x| is so large that it needs the powers of 1/x.
template <typename T>
inline bool all_near(const PadeBlock<T>& block) {
  constexpr int V = Vec<T>::size();
  Vec<T> far(0);
  for (int64_t i = 0; i < block.vectors; ++i) {
    far = far | (Vec<T>::loadu(block.in[0] + i * V).abs() > Vec<T>(kNear));
  }
  return far.zero_mask() == (1 << V) - 1;
}

template <class Op, bool Near, class Form, typename T, class Point>
C10_ALWAYS_INLINE void evaluate(const Form& form, const PadeBlock<T>& block, int64_t i,
                                const T* rows, Point& point) {
  for (int j = 0; j < Op::kIn; ++j) {
    point.in[j] = Vec<T>::loadu(block.in[j] + i * Vec<T>::size());
  }
  point.z.template fill<Near>(form, point.in[0]);
  point.compute(form, rows);
}

template <class Op, typename T, class Point>
C10_ALWAYS_INLINE void store(const PadeBlock<T>& block, int64_t i, const Point& point) {
  for (int j = 0; j < Op::kOut; ++j) point.out[j].store(block.out[j] + i * Vec<T>::size());
}

// The whole block, with `Near` if it is all near; `Spread` if each position has coefficients and
// sums of its own. Terms are added in pairs, a few pairs at a time, and these to `block.sums`: the
// longer a sum of floats, the more its roundings take from it.
template <class Op, bool Near, bool Spread, class Form, typename T>
void pade_block(const AnyForm& given, const PadeBlock<T>& given_block) {
  constexpr int V = Vec<T>::size();
  constexpr int64_t kStretch = Spread ? 1 : 16;
  const Form form(given);
  const PadeBlock<T> block = given_block;
  using Point = typename Op::template Point<T>;
  const int row_count = Op::rows(given), sum_count = Op::kSums ? form.m + 1 + form.n : 0;
  for (int64_t from = 0; from < block.vectors; from += kStretch) {
    const int64_t until = std::min(from + kStretch, block.vectors);
    const T* rows = block.rows + (Spread ? from * row_count * V : 0);
    T* memory = block.sums + (Spread ? from * sum_count * V : 0);
    Vec<T> sums[Form::kMostSums];
    for (int k = 0; k < sum_count; ++k) sums[k] = Vec<T>(0);
    int64_t i = from;
    for (; i + 1 < until; i += 2) {
      Point u, v;
      evaluate<Op, Near>(form, block, i, rows, u);
      evaluate<Op, Near>(form, block, i + 1, rows, v);
      store<Op>(block, i, u);
      store<Op>(block, i + 1, v);
      if constexpr (Op::kSums) {
        sums[0] = sums[0] + (u.constant() + v.constant());
        for (int k = 1; k <= form.m; ++k) sums[k] = sums[k] + v.numerator(k, u.numerator(k));
        Vec<T>* below = sums + form.m;
        for (int k = 1; k <= form.n; ++k) below[k] = below[k] + v.denominator(k, u.denominator(k));
      }
    }
    for (; i < until; ++i) {
      Point u;
      evaluate<Op, Near>(form, block, i, rows, u);
      store<Op>(block, i, u);
      if constexpr (Op::kSums) {
        sums[0] = sums[0] + u.constant();
        for (int k = 1; k <= form.m; ++k) sums[k] = sums[k] + u.numerator(k);
        Vec<T>* below = sums + form.m;
        for (int k = 1; k <= form.n; ++k) below[k] = below[k] + u.denominator(k);
      }
    }
    for (int k = 0; k < sum_count; ++k) {
      (Vec<T>::loadu(memory + k * V) + sums[k]).store(memory + k * V);
    }
  }
}

}  // namespace fastcil
