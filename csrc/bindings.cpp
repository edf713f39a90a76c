// The Python module dnl_ext._C: build information and capability queries. Nothing here is on the forward path, which
// goes through torch.ops.dnl_ext.* (a pybind11 call would break torch.compile's graph). The operators are a library of
// their own, libdnl_ext.so, which knows no Python and which this one links to: a C++ program loads that alone.

// torch's copy of pybind11 refuses to serve files that ask for the stable ABI; this one uses nothing else of torch.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "core/cpu/kernels.h"
#include "core/errors.h"
#include "core/python_errors.h"
#include "core/tf32.h"
#include "ops/pairwise/path_choice.h"

#ifndef DNL_EXT_CUDA_ARCHS
#define DNL_EXT_CUDA_ARCHS ""
#endif
#ifndef DNL_EXT_CUDA_LEFT_OUT
#define DNL_EXT_CUDA_LEFT_OUT ""
#endif
#ifndef DNL_EXT_TORCH_VERSION
#define DNL_EXT_TORCH_VERSION "unknown"
#endif

namespace py = pybind11;

static dnl::DType dtype_of(const std::string& name) {
  return name == "float64"    ? dnl::DType::f64
         : name == "bfloat16" ? dnl::DType::bf16
         : name == "float16"  ? dnl::DType::f16
                              : dnl::DType::f32;
}

// Asks torch's newer setting, fp32_precision, where there is one: allow_tf32 writes to it too, and raises when it
// is read after both have been used.
static bool torch_allows_tf32() {
  if (!Py_IsInitialized()) return false;
  const py::gil_scoped_acquire gil;
  const py::module_ torch = py::module_::import("torch._C");
  if (py::hasattr(torch, "_get_fp32_precision_getter"))
    return torch.attr("_get_fp32_precision_getter")("cuda", "matmul").cast<std::string>() == "tf32";
  return torch.attr("_get_cublas_allow_tf32")().cast<bool>();
}

static const char* name_of(dnl::DType dtype) {
  switch (dtype) {
    case dnl::DType::f64:
      return "float64";
    case dnl::DType::f32:
      return "float32";
    case dnl::DType::bf16:
      return "bfloat16";
    case dnl::DType::f16:
      return "float16";
  }
  return "";
}

// What set_path_query registered. Never freed: operators may run until the process ends.
static PyObject* path_query = nullptr;

static dnl::PathAnswer ask_for_path(const dnl::PathQuestion& question) {
  dnl::PathAnswer answer{dnl::CudaPath::chain, false};
  if (!Py_IsInitialized()) return answer;
  const py::gil_scoped_acquire gil;
  const dnl::PairwiseShape& shape = question.shape;
  try {
    const py::dict layout(py::arg("query_channel_first") = shape.query_channel_first,
                          py::arg("key_channel_first") = shape.key_channel_first,
                          py::arg("value_channel_first") = shape.value_channel_first);
    const py::object found = py::reinterpret_borrow<py::function>(path_query)(
        question.device, question.gpu.capability, question.gpu.multiprocessors, name_of(shape.dtype), question.backward,
        py::make_tuple(shape.batches, shape.queries, shape.keys, shape.width, shape.channels), layout);
    const auto [name, keep] = found.cast<std::pair<std::string, bool>>();
    for (const dnl::NamedPath& known : dnl::kCudaPaths)
      if (name == known.name) return {known.path, keep};
  } catch (py::error_already_set& error) {
    const bool interrupted = error.matches(PyExc_KeyboardInterrupt);
    error.discard_as_unraisable("dnl_ext: the choice of a path");
    if (interrupted) PyErr_SetInterrupt();  // whoever waits for the call is to know
  }
  return answer;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of dnl_ext; the operators are torch.ops.dnl_ext.*";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const dnl::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const dnl::NotImplementedError& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    } catch (const dnl::OutOfMemoryError& e) {
      PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), e.what());
    }
  });

  m.def(
      "route_errors",
      [](const std::string& route) {
        dnl::PythonErrors errors;
        errors.set = [](PyObject* type, const char* text) { PyErr_SetString(type, text); };
        errors.value_error = PyExc_ValueError;
        errors.type_error = PyExc_TypeError;
        errors.not_implemented_error = PyExc_NotImplementedError;
        errors.out_of_memory_error = py::object(py::module_::import("torch").attr("OutOfMemoryError")).release().ptr();
        errors.route = route == "pybind"  ? dnl::ErrorRoute::pybind
                       : route == "torch" ? dnl::ErrorRoute::torch
                                          : dnl::ErrorRoute::registered;
        dnl::python_errors() = errors;
      },
      "How errors of operators get to Python (core/python_errors.h): \"registered\", \"pybind\" or \"torch\".");

  dnl::set_tf32_query(&torch_allows_tf32);
  m.def("tf32_allowed", &dnl::tf32_allowed, "Whether torch lets products of float32 on CUDA use TF32.");

  m.def("build_info", [] {
    py::dict info;
    info["torch"] = DNL_EXT_TORCH_VERSION;
    info["cuda_archs"] = DNL_EXT_CUDA_ARCHS;
    info["cuda_left_out"] = DNL_EXT_CUDA_LEFT_OUT;  // why there is no CUDA, empty where there is
#ifdef DNL_EXT_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    return info;
  });

  m.def("cpu_capability", [] { return dnl::cpu_kernels().name; }, "Instruction set the CPU kernels run with.");
  m.def("amx_state", &dnl::amx_state, "Whether AMX tiles are in use, or why not.");
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
      "cpu_peak",
      [](const std::string& capability, const std::string& dtype, int threads) {
        for (const dnl::CpuKernels* kernels : dnl::all_cpu_kernels())
          if (capability == kernels->name && kernels->supported()) {
            const py::gil_scoped_release released;
            return dnl::cpu_peak(*kernels, dtype_of(dtype), std::max(threads, 1));
          }
        throw dnl::ValueError(dnl::message("capability: ", capability, " is not built or not supported by this CPU"));
      },
      "Measured operations per second of an instruction set on registers alone, in the type in which tensors of "
      "`dtype` "
      "are multiplied; about a tenth of a second.");
  m.def(
      "whiten_names",
      [] {
        py::list names;
        for (const dnl::Whitening& whitening : dnl::kWhitenings) names.append(whitening.name);
        return names;
      },
      "Names that torch.ops.dnl_ext.whiten_forward knows.");
  m.def(
      "pairwise_workspace",
      [](const std::string& dtype, int64_t batches, int64_t queries, int64_t keys, int64_t width, int64_t channels,
         bool whiten, bool unary, int threads) {
        dnl::PairwiseArgs args{};
        args.dtype = dtype_of(dtype);
        args.batches = batches;
        args.queries = queries;
        args.keys = keys;
        args.width = width;
        args.channels = channels;
        args.scale = 1.0;
        args.whiten = whiten;
        dnl::Executor executor;
        executor.threads = threads;
        const auto& kernels = dnl::cpu_kernels();
        if (!batches || !queries) return py::make_tuple(size_t(0), size_t(0));
        const size_t forward = kernels.pairwise_forward_workspace(args, executor);
        char wanted;  // where a gradient would be; sizing reads no data
        args.grad_output.data = args.grad_query.data = args.grad_key.data = args.grad_value.data = &wanted;
        args.grad_output.position = 1;  // channel-first
        if (unary) args.mask.data = args.grad_mask.data = &wanted;
        const size_t backward = kernels.pairwise_backward_workspace(args, executor);
        return py::make_tuple(size_t(forward), size_t(backward));
      },
      "Bytes of workspace that forward and backward (all gradients, channel-first) allocate on the CPU.");
  m.def(
      "cuda_plan",
      [](const std::string& dtype, int64_t batches, int64_t queries, int64_t keys, int64_t width, int64_t channels,
         bool query_channel_first, bool key_channel_first, bool value_channel_first, bool backward, int capability,
         int multiprocessors, int shared_bytes, std::optional<bool> tf32, const std::string& path,
         const std::string& advised, std::optional<bool> hopper_built) {
        dnl::PairwiseShape shape;
        shape.dtype = dtype_of(dtype);
        shape.tf32 = shape.dtype == dnl::DType::f32 && (tf32 ? *tf32 : dnl::tf32_allowed());
        shape.batches = batches, shape.queries = queries, shape.keys = keys;
        shape.width = width, shape.channels = channels;
        shape.query_channel_first = query_channel_first;
        shape.key_channel_first = key_channel_first;
        shape.value_channel_first = value_channel_first;
        const dnl::Gpu gpu{capability, multiprocessors, shared_bytes ? shared_bytes : dnl::shared_bytes_of(capability)};
        const dnl::CudaPath request = path.empty() ? dnl::requested_path() : dnl::path_named(path, "path");
        const dnl::PairwisePlan plan =
            dnl::plan_pairwise(shape, gpu, request, backward, dnl::path_named(advised, "advised"),
                               hopper_built.value_or(dnl::kHopperBuilt));
        py::dict result;
        result["path"] = plan.hopper ? "hopper" : plan.fused ? "fused" : "chain";
        result["why"] = plan.why;
        result["advised"] = plan.advised;
        const dnl::ForwardPlan& forward = plan.forward;
        if (forward.slices) {
          const dnl::ForwardTile& tile = dnl::kForwardTiles[forward.tile];
          result["fused_tile"] = py::make_tuple(tile.queries, tile.keys);
          result["slices"] = forward.slices;
          result["slice_channels"] = forward.slice_channels;
          result["splits"] = forward.splits;
          result["shared_bytes"] = forward.shared.bytes;
        }
        return result;
      },
      py::arg("dtype"), py::arg("batches"), py::arg("queries"), py::arg("keys"), py::arg("width"), py::arg("channels"),
      py::kw_only(), py::arg("query_channel_first") = false, py::arg("key_channel_first") = false,
      py::arg("value_channel_first") = false, py::arg("backward") = false, py::arg("capability") = 80,
      py::arg("multiprocessors") = 108, py::arg("shared_bytes") = 0, py::arg("tf32") = py::none(), py::arg("path") = "",
      py::arg("advised") = "", py::arg("hopper_built") = py::none(),
      "Path, reason and tiles that a CUDA call takes. shared_bytes = 0: what the architecture has. tf32 = None: what "
      "torch allows now. path: what it must take, by default that of DNL_EXT_CUDA_PATH; advised: what it takes where "
      "it can and nothing else is asked for. hopper_built = None: whether this build has code for 9.0a.");
  m.def(
      "cuda_paths",
      [] {
        py::list names;
        for (const dnl::NamedPath& path : dnl::kCudaPaths) names.append(path.name);
        return names;
      },
      "Names of the paths of pairwise attention on CUDA.");
  m.def(
      "set_path_query",
      [](const py::function& query) {
        path_query = py::function(query).release().ptr();
        dnl::set_path_query(&ask_for_path);
      },
      "Registers what is asked for the path of a call on CUDA, once for each shape: a function of (device, capability, "
      "multiprocessors, dtype, backward, (batches, queries, keys, width, channels), layout) that returns the path's "
      "name and whether to keep that answer.");
  m.def("forget_paths", &dnl::forget_paths, "Asks for the path of every shape anew.");
  m.def(
      "force_path", [](const std::string& path) { dnl::force_path(dnl::path_named(path, "path")); },
      "What this thread's calls take, whatever else is set; an empty name for nothing.");
  m.def(
      "pairwise_compute_type",
      [](const std::string& dtype) {
        const auto& kernels = dnl::cpu_kernels();
        if (dtype == "float64") return "float64";
        return dtype == "bfloat16" && kernels.bf16_products ? "bfloat16" : "float32";
      },
      "Type in which the CPU path multiplies tensors of `dtype`; sums are float32 or wider.");
}
