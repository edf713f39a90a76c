// The Python module dnl_ext._C: build information and capability queries. Nothing here is on the forward path, which
// goes through torch.ops.dnl_ext.* (a pybind11 call would break torch.compile's graph).
#include <pybind11/pybind11.h>

#include "core/cpu/kernels.h"
#include "core/errors.h"

#ifndef DNL_EXT_CUDA_ARCHS
#define DNL_EXT_CUDA_ARCHS ""
#endif
#ifndef DNL_EXT_TORCH_VERSION
#define DNL_EXT_TORCH_VERSION "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of dnl_ext; the operators are torch.ops.dnl_ext.*";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const dnl::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const dnl::NotImplementedError& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });

  m.def("build_info", [] {
    py::dict info;
    info["torch"] = DNL_EXT_TORCH_VERSION;
    info["cuda_archs"] = DNL_EXT_CUDA_ARCHS;
#ifdef DNL_EXT_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["compiler"] = __VERSION__;
    return info;
  });

  m.def("cpu_capability", [] { return dnl::cpu_kernels().name; }, "Instruction set the CPU kernels run with.");
  m.def(
      "cpu_capabilities",
      [] {
        py::list names;
        for (const dnl::CpuKernels* kernels : dnl::all_cpu_kernels())
          names.append(py::make_tuple(kernels->name, kernels->supported()));
        return names;
      },
      "Every instruction set that was built, and whether this CPU has it.");
  m.def(
      "pairwise_compute_type",
      [](const std::string& dtype) {
        const auto& kernels = dnl::cpu_kernels();
        if (dtype == "float64") return "float64";
        return dtype == "bfloat16" && kernels.bf16_products ? "bfloat16" : "float32";
      },
      "Type in which the CPU path multiplies tensors of `dtype`; sums are float32 or wider.");
}
