// ATen's vectors. functional.h and not vec.h alone: with AVX-512 the former holds the conversions
// of bfloat16 and half that the latter calls.
#pragma once

#include <ATen/cpu/vec/functional.h>
