// The module fastcil._C. Importing it registers the CPU kernels of the other files here;
// its one function tells how they were built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace {

#define FASTCIL_TEXT_(token) #token
#define FASTCIL_TEXT(token) FASTCIL_TEXT_(token)

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["compiler"] = kCompiler;
  facts["cxx_standard"] = __cplusplus;
  facts["flags"] = FASTCIL_CXX_FLAGS;
#ifdef _OPENMP
  facts["openmp"] = true;
#else
  facts["openmp"] = false;
#endif
  facts["cpu_capability"] = FASTCIL_TEXT(CPU_CAPABILITY);
  facts["torch"] = TORCH_VERSION;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of fastcil for the CPU.";
  module.def(
      "build_facts",
      &build_facts,
      "Compiler, C++ standard, flags, OpenMP, CPU capability and torch version of this build.");
}
