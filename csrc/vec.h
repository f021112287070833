// ATen's vectors. functional.h and not vec.h alone: with AVX-512 the former holds the conversions
// of bfloat16 and half that the latter calls, and gcc 12's own headers warn of the undefined
// vectors they begin with (GCC bug 105593).
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // ATen's own
#include <ATen/cpu/vec/functional.h>
#pragma GCC diagnostic pop
