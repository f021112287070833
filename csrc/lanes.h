// Vectors of float32 (of float64 for float64) from and to memory of any floating dtype.
#pragma once

#include <ATen/OpMathType.h>

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace fastcil {

template <typename scalar_t>
using Working = at::opmath_type<scalar_t>;

template <typename scalar_t>
using Lanes = at::vec::Vectorized<Working<scalar_t>>;

// The first `count` lanes; the others are zeros.
template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> get(const scalar_t* from,
                                      int64_t count = Lanes<scalar_t>::size()) {
  constexpr int64_t size = Lanes<scalar_t>::size();
  scalar_t some[size] = {};
  if (count < size) from = (std::copy_n(from, count, some), some);
  if constexpr (std::is_same_v<scalar_t, Working<scalar_t>>) {
    return Lanes<scalar_t>::loadu(from);
  } else {
    Lanes<scalar_t> value;
    at::vec::load_to_float<scalar_t>(from, value);
    return value;
  }
}

template <typename scalar_t>
C10_ALWAYS_INLINE void put(const Lanes<scalar_t>& value, scalar_t* to, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, Working<scalar_t>>) {
    if (count == Lanes<scalar_t>::size()) {
      value.store(to);
    } else {
      value.store(to, count);
    }
  } else {
    at::vec::convert_from_float<scalar_t>(value, value).store(to, count);
  }
}

// Calls f(i, count) for `size` elements at a time, and then for the rest of them.
template <typename scalar_t, typename Function>
C10_ALWAYS_INLINE void sweep(int64_t length, const Function& f) {
  constexpr int64_t size = Lanes<scalar_t>::size();
  int64_t i = 0;
  for (; i + size <= length; i += size) f(i, size);
  if (i < length) f(i, length - i);
}

}  // namespace fastcil
