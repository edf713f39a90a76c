// Runs a block compiled by export.py, without Python: run_block libdnl_ext.so block.pt2 cases.pt
//
// The package holds the code of the model; the operators of dnl_ext it calls by name, and they are in a library of
// their own, which registers them with libtorch when it is loaded. Every case is an image and the output that Python
// gave; exits 1 if one differs by more than rounding. Single precision, and convolutions may be added up in another
// order.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

constexpr double kRelative = 1e-4;  // of the largest value of the output

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_block libdnl_ext.so block.pt2 cases.pt\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_LOCAL)) {
    std::cerr << "cannot load the operators: " << dlerror() << "\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader block(argv[2]);

  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  int failures = 0;
  for (const c10::IValue& pair : torch::jit::pickle_load(bytes).toList().vec()) {
    const auto image = pair.toList().get(0).toTensor(), expected = pair.toList().get(1).toTensor();
    const at::Tensor output = block.run({image}).at(0);
    TORCH_CHECK(output.sizes() == expected.sizes(), "output: expected ", expected.sizes(), ", got ", output.sizes());
    const double error = (output - expected).abs().max().item<double>() / expected.abs().max().item<double>();
    const bool passes = error <= kRelative;  // false for NaN
    std::cout << image.sizes() << ": relative error " << error << (passes ? "" : "  FAILED") << "\n";
    failures += !passes;
  }
  return failures ? 1 : 0;
}
